"""validate: judge the manifest with Great Expectations; the verdict goes to `data/reports/validate.json`.

Every rule is one of Great Expectations' own expectations on the manifest or on a small table made of it.
The verdict is for others to act on: the stage itself ends well whether the data passes or not.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import numpy.typing as npt
import pandas as pd

from tasks.core import config, files, paths
from tasks.core.errors import StageError, run
from tasks.core.files import Json
from tasks.core.quiet import set_quiet

SPLITS = ("train", "val", "test")
COLUMNS = (
    "path", "label", "width", "height", "sha256", "pixels_sha256", "perceptual_hash", "group", "split", "std",
    "readable", "reason",
)  # fmt: skip
KEYS = {
    "rows": ["path"], "images": ["path"], "splits": ["class", "split"], "classes": ["class"], "source": ["what"],
    "depth": ["what"],
}  # fmt: skip
SHOWN = 5
BANDS = 17  # perceptual hashes that differ in fewer bits than there are bands have a band in common
AT_ONCE = 4096  # hashes that one is compared with before the next are looked at

Positions = npt.NDArray[np.intp]


class Rule(NamedTuple):
    """What must hold, in words and as one of Great Expectations' column expectations on one of the `tables`."""

    name: str
    severity: Literal["critical", "warning"]
    says: str
    table: str
    column: str
    expectation: str
    arguments: Json


SCHEMA = Rule("columns", "critical", f"the manifest has the columns {', '.join(COLUMNS)}",
              "rows", "", "ExpectTableColumnsToMatchSet",
              {"column_set": list(COLUMNS), "exact_match": False})  # fmt: skip


def tables(manifest: pd.DataFrame, report: Json, classes: tuple[str, ...]) -> dict[str, pd.DataFrame]:
    """What the rules look at: all `rows`, the readable `images`, and image counts by class in `splits` and `classes`.

    And of the `report` of ingest, the share of the source's files that was passed over, and the `depth` of 16 bits.

    Great Expectations passes over nulls, so a hole in a readable row is filled with a value that breaks a rule.
    """
    readable = manifest["readable"].eq(True)
    unreadable = manifest["reason"].fillna("no reason given").mask(readable)
    rows = manifest.fillna({"path": "none", "sha256": "none"}).assign(unreadable=unreadable)
    holes = {"label": "none", "pixels_sha256": "none", "split": "none", "width": 0, "height": 0, "std": 0}
    rows = rows.sort_values(["pixels_sha256", "sha256"], kind="stable", ignore_index=True)  # copies side by side
    images = rows[rows["unreadable"].isna()].fillna(holes).reset_index(drop=True)
    images = images.assign(
        file_in=_splits_of(images, "sha256"),
        pixels_in=_splits_of(images, "pixels_sha256"),
        group_in=_splits_of(images, "group").where(images["group"].notna(), None),
        labels=_contradictions(images),
        looks_like=_look_alikes(images),
    )
    pairs = pd.MultiIndex.from_product([classes, SPLITS], names=["class", "split"])
    splits = images.groupby(["label", "split"]).size().reindex(pairs, fill_value=0).reset_index(name="images")
    by_class = splits.groupby("class", sort=False)["images"].sum().reset_index()
    by_class["times_smaller"] = by_class["images"].max() / by_class["images"].where(by_class["images"] > 0)
    source = pd.DataFrame([_passed_over(report)], columns=["what", "share"])
    depth = pd.DataFrame([_depth(report)], columns=["what", "used"])
    return {
        "rows": rows, "images": images, "splits": splits, "classes": by_class, "source": source, "depth": depth,
    }  # fmt: skip


def _contradictions(images: pd.DataFrame) -> pd.Series:
    """Each label with a path, as in `cat (a.png) and dog (b.png)`, for pixels that have several; None for others."""
    pairs = images.drop_duplicates(["pixels_sha256", "label"]).sort_values("label")
    pairs = pairs[pairs.duplicated("pixels_sha256", keep=False)]
    named = (pairs["label"] + " (" + pairs["path"] + ")").astype(object)
    said = {pixels: " and ".join(names) for pixels, names in named.groupby(pairs["pixels_sha256"])}
    return images["pixels_sha256"].map(said.get).astype(object)


def _look_alikes(images: pd.DataFrame) -> pd.Series:
    """For images of test or val one of another split that looks the same, as in `train: cat/1.png`; None for others.

    Perceptual hashes of the two differ in fewer than BANDS of 256 bits. Images of one colour are left out.
    """
    found = pd.Series(None, index=images.index, dtype=object)
    usable = images[images["perceptual_hash"].notna() & (images["std"] > 0)]
    if usable.empty:
        return found
    hashes = np.frombuffer(bytes.fromhex("".join(usable["perceptual_hash"])), np.uint64).reshape(-1, 4)
    ranks = usable["split"].map({"train": 0, "val": 1, "test": 2}).fillna(-1).to_numpy(np.int8)
    bits = np.unpackbits(hashes.view(np.uint8), axis=1)
    seen = np.zeros(len(usable), bool)
    for bucket in _buckets(np.flatnonzero(ranks >= 0), bits[ranks >= 0]):
        for later, earlier in _close_pairs(bucket[~seen[bucket] | (ranks[bucket] < 2)], hashes, ranks, seen):
            seen[later], other = True, usable.iloc[earlier]
            found[usable.index[later]] = f"{other['split']}: {other['path']}"
    return found


def _buckets(members: Positions, bits: npt.NDArray[np.uint8], depth: int = 2) -> Iterator[Positions]:
    """Sets of members of which any two are in one whose rows of `bits` differ in fewer than BANDS columns.

    Those are the same in one band at least. A large set is taken apart by its other columns, down to that `depth`.
    """
    bits = bits[:, bits.min(0) < bits.max(0)]  # the others tell none of the members apart
    width = bits.shape[1] // BANDS
    for band in range(BANDS):
        own = slice(band * width, (band + 1) * width)
        keys = bits[:, own] @ (1 << np.arange(width))
        order = np.argsort(keys, kind="stable")
        starts = np.flatnonzero(np.diff(keys[order], prepend=-1))
        sizes = np.diff(starts, append=len(keys))
        for start, size in zip(starts[sizes > 1], sizes[sizes > 1], strict=True):
            inside = order[start : start + size]
            if depth and size > AT_ONCE and width:
                yield from _buckets(members[inside], bits[inside], depth - 1)
            else:
                yield members[inside]


def _close_pairs(bucket: Positions, hashes: Any, ranks: Any, seen: Any) -> Iterator[tuple[int, int]]:
    """Pairs of positions with close hashes in different splits, that of the higher rank first, one for each.

    Those that were `seen` are not looked at again.
    """
    for rank in np.unique(ranks[bucket])[1:]:
        inner, outer = bucket[ranks[bucket] == rank], bucket[ranks[bucket] < rank]
        for one in inner[~seen[inner]]:
            for start in range(0, len(outer), AT_ONCE):
                others = outer[start : start + AT_ONCE]
                close = np.flatnonzero(np.bitwise_count(hashes[others] ^ hashes[one]).sum(1) < BANDS)
                if len(close):
                    yield int(one), int(others[close[0]])
                    break


def _passed_over(report: Json) -> tuple[str, float]:
    """What of the source was not taken, and its share of all files."""
    kinds = report["passed_over"]
    files_left = sum(kind["files"] for kind in kinds.values())
    total = files_left + report["images"]
    said = ", ".join(f"{kind['files']} {reason}" for reason, kind in kinds.items())
    return f"{files_left} of {total} files were not taken: {said}", files_left / max(total, 1)


def _depth(report: Json) -> tuple[str, float]:
    """Which values files of 16 bits have, and the share of the range up to white that they use; 1 if there are none."""
    count, largest, white = report["of_16_bits"], report["values_of_16_bits_up_to"], report["white_level"]
    if not count:
        return "no file has 16 bits", 1.0
    return f"{count} files have 16 bits and values up to {largest}", (largest or 0) / white


def _splits_of(images: pd.DataFrame, column: str) -> pd.Series:
    """For every image the splits that images with the same value in `column` are in, as in `test and train`."""
    pairs = images[[column, "split"]].drop_duplicates().sort_values("split")
    leaks = pairs[pairs.duplicated(column, keep=False)].groupby(column)["split"].agg(" and ".join)
    return images[column].map(leaks).astype("str").fillna(images["split"])


def rules(params: config.Validate, classes: tuple[str, ...], images: int) -> list[Rule]:
    """All rules on the contents of the `tables`, with so many images."""
    least, most = params.min_side, params.max_side
    few, times, passed = params.min_rows_per_class, params.max_class_imbalance, params.max_passed_over_fraction
    allowed = max(0, 1 - params.max_near_duplicates / max(images, 1) - 1e-12)  # as Great Expectations counts
    names, one, between = {"value_set": list(classes)}, {"value_set": list(SPLITS)}, "ExpectColumnValuesToBeBetween"
    return [
        Rule("decodable", "warning", "every image can be used",
             "rows", "unreadable", "ExpectColumnValuesToBeNull", {}),
        Rule("sha256", "critical", "every sha256 is 64 hexadecimal digits",
             "rows", "sha256", "ExpectColumnValuesToMatchRegex", {"regex": r"\A[0-9a-f]{64}\Z"}),
        Rule("duplicates", "warning", "every file is there once",
             "rows", "sha256", "ExpectColumnValuesToBeUnique", {}),
        Rule("labels", "critical", "every label is one of the declared classes",
             "images", "label", "ExpectColumnValuesToBeInSet", names),
        Rule("width", "critical", f"every image is {least} to {most} pixels wide",
             "images", "width", between, {"min_value": least, "max_value": most}),
        Rule("height", "critical", f"every image is {least} to {most} pixels high",
             "images", "height", between, {"min_value": least, "max_value": most}),
        Rule("blank", "warning", "every image has more than one colour (std over 0)",
             "images", "std", between, {"min_value": 0, "strict_min": True}),
        Rule("file_leaks", "critical", "a file and its copies are in one split",
             "images", "file_in", "ExpectColumnValuesToBeInSet", one),
        Rule("pixel_leaks", "critical", "images with the same pixels are in one split",
             "images", "pixels_in", "ExpectColumnValuesToBeInSet", one),
        Rule("group_leaks", "critical", "a group is in one split",
             "images", "group_in", "ExpectColumnValuesToBeInSet", one),
        Rule("contradictions", "critical", "images with the same pixels have one label",
             "images", "labels", "ExpectColumnValuesToBeNull", {}),
        Rule("look_alikes", "warning", "no image looks like one of another split",
             "images", "looks_like", "ExpectColumnValuesToBeNull", {"mostly": allowed}),
        Rule("rows", "critical", f"every class has at least {few} images in every split",
             "splits", "images", between, {"min_value": few}),
        Rule("classes", "critical", "every declared class has images",
             "classes", "images", between, {"min_value": 1}),
        Rule("balance", "warning", f"no class is more than {times:g} times smaller than the largest",
             "classes", "times_smaller", between, {"max_value": times}),
        Rule("passed_over", "warning", f"at most {passed:g} of the source's files are passed over",
             "source", "share", between, {"max_value": passed}),
        Rule("depth", "warning", "files of 16 bits use the range up to ingest.white_level, and no more",
             "depth", "used", between, {"min_value": 0.5, "max_value": 1}),
    ]  # fmt: skip


def check_expectations(frames: dict[str, pd.DataFrame], wanted: list[Rule], docs: Path) -> dict[str, Json]:
    """Great Expectations' result for each rule by its name; also writes Data Docs to the directory `docs`."""
    import great_expectations as gx
    from great_expectations.core.run_identifier import RunIdentifier

    context = _context(docs)
    source = context.data_sources.add_pandas("manifest")
    results = {}
    for table, frame in frames.items():
        suite = context.suites.add(gx.ExpectationSuite(name=table))
        for rule in wanted:
            if rule.table == table:
                suite.add_expectation(_expectation(rule))
        batch = source.add_dataframe_asset(table).add_batch_definition_whole_dataframe("all")
        definition = context.validation_definitions.add(gx.ValidationDefinition(name=table, data=batch, suite=suite))
        judged = definition.run(
            batch_parameters={"dataframe": frame},
            result_format={"result_format": "SUMMARY", "partial_unexpected_count": SHOWN},
            run_id=RunIdentifier(run_name="validate"),
        )
        for result in judged.to_json_dict()["results"]:
            results[result["expectation_config"]["meta"]["name"]] = result
    context.build_data_docs(site_names=["weighin"])
    return results


def _context(docs: Path) -> Any:
    """A Great Expectations context in memory, silent, with a Data Docs site in `docs`."""
    import great_expectations as gx
    from great_expectations.data_context.types.base import ProgressBarsConfig

    context: Any = gx.get_context(mode="ephemeral")
    context.variables.progress_bars = ProgressBarsConfig(globally=False, metric_calculations=False)
    site = {
        "class_name": "SiteBuilder",
        "show_how_to_buttons": False,
        "store_backend": {"class_name": "TupleFilesystemStoreBackend", "base_directory": str(docs.absolute())},
        "site_index_builder": {"class_name": "DefaultSiteIndexBuilder"},
    }
    context.add_data_docs_site("weighin", site)
    return context


def _expectation(rule: Rule) -> Any:
    import great_expectations.expectations as gxe

    column = {} if rule is SCHEMA else {"column": rule.column}
    about = {"severity": rule.severity, "notes": rule.says, "meta": {"name": rule.name}}
    return getattr(gxe, rule.expectation)(**column, **rule.arguments, **about)


def outcome(rule: Rule, judged: Json, frame: pd.DataFrame) -> Json:
    """One entry of the verdict; `StageError` if the expectation could not be evaluated at all."""
    result, passed = judged["result"], bool(judged["success"])
    if rule is SCHEMA:
        offending = [{"column": name, "value": "missing"} for name in COLUMNS if name not in frame.columns]
        observed = {"checked": len(COLUMNS), "offending": len(offending)}
    elif "unexpected_count" in result:
        observed, offending = _observation(rule, result, frame)
    else:
        raise StageError(f"{paths.MANIFEST}: {rule.name} cannot be judged; run ingest again")
    entry = {"name": rule.name, "severity": rule.severity, "passed": passed, "observed": observed}
    return {**entry, "offending": offending[:SHOWN], "sentence": _sentence(rule.says, passed, observed, offending)}


def _observation(rule: Rule, result: Json, frame: pd.DataFrame) -> tuple[Json, list[Any]]:
    values = frame[rule.column]
    observed = {"checked": len(frame), "offending": result["unexpected_count"]}
    if pd.api.types.is_numeric_dtype(values) and values.notna().any():
        observed |= {"min": values.min().item(), "max": values.max().item()}
    shown = frame.loc[result["partial_unexpected_index_list"], [*KEYS[rule.table], rule.column]].astype(object)
    return observed, shown.rename(columns={rule.column: "value"}).to_dict("records")


def _sentence(says: str, passed: bool, observed: Json, offending: list[Json]) -> str:
    span = f"from {observed['min']:g} to {observed['max']:g}" if "min" in observed else ""
    if passed:
        return says[0].upper() + says[1:] + (f" ({span})." if span else ".")
    count, checked = observed["offending"], observed["checked"]
    *where, value = offending[0].values()
    found = f"; observed {span}" if span else ""
    return f"Expected that {says}, but not so for {count} of {checked}{found}, such as {' in '.join(where)}: {value}."


def validate(
    manifest: pd.DataFrame, report: Json, params: config.Validate, classes: tuple[str, ...], docs: Path
) -> Json:
    """The verdict on a manifest and the report of ingest, fit for JSON; Data Docs go to the new directory `docs`.

    It fails if any critical expectation does; a warning is told and lets pass.
    """
    set_quiet()  # read when Great Expectations is imported
    frames, wanted = {"rows": manifest}, [SCHEMA]
    if set(COLUMNS) <= set(manifest.columns):
        frames = tables(manifest, report, classes)
        wanted = [SCHEMA, *rules(params, classes, len(frames["images"]))]
    judged = check_expectations(frames, wanted, docs)
    expectations = [outcome(rule, judged[rule.name], frames[rule.table]) for rule in wanted]
    passed = all(entry["passed"] or entry["severity"] != "critical" for entry in expectations)
    return {"passed": passed, "rows": len(manifest), "expectations": expectations}


def main() -> None:
    params = config.load()
    try:
        manifest = pd.read_parquet(paths.MANIFEST)
    except ValueError as error:
        raise StageError(f"{paths.MANIFEST} is not Parquet; run ingest again ({error})") from None
    with files.replacing(paths.DATA_DOCS) as (docs,):
        report = files.read_json(paths.report("ingest"))
        verdict = validate(manifest, report, params.validate_, config.class_names(params), docs)
    files.write_json(paths.report("validate"), verdict)
    failed = [entry for entry in verdict["expectations"] if not entry["passed"]]
    for entry in failed:
        print(f"validate: {entry['severity']}: {entry['name']}: {entry['sentence']}")
    held = f"{len(verdict['expectations']) - len(failed)} of {len(verdict['expectations'])} expectations hold"
    print(f"validate: {'passed' if verdict['passed'] else 'failed'}, {verdict['rows']} rows, {held}")


if __name__ == "__main__":
    run(main)
