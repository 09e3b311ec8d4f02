"""validate: judge the manifest with Great Expectations; the verdict goes to `data/reports/validate.json`.

Every rule is one of Great Expectations' own expectations on the manifest or on a small table made of it.
The verdict is for others to act on: the stage itself ends well whether the data passes or not.
"""

from pathlib import Path
from typing import Any, Literal, NamedTuple

import pandas as pd

from tasks.core import config, files, paths
from tasks.core.errors import StageError, run
from tasks.core.files import Json
from tasks.core.quiet import set_quiet

SPLITS = ("train", "val", "test")
COLUMNS = (
    "path", "label", "width", "height", "sha256", "pixels_sha256", "split", "std", "readable", "reason",
)  # fmt: skip
KEYS = {"rows": ["path"], "images": ["path"], "splits": ["class", "split"], "classes": ["class"]}
SHOWN = 5


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


def tables(manifest: pd.DataFrame, classes: tuple[str, ...]) -> dict[str, pd.DataFrame]:
    """What the rules look at: all `rows`, the readable `images`, and image counts by class in `splits` and `classes`.

    Great Expectations passes over nulls, so a hole in a readable row is filled with a value that breaks a rule.
    """
    readable = manifest["readable"].eq(True)
    unreadable = manifest["reason"].fillna("no reason given").mask(readable)
    rows = manifest.fillna({"path": "none", "sha256": "none"}).assign(unreadable=unreadable)
    holes = {"label": "none", "pixels_sha256": "none", "split": "none", "width": 0, "height": 0, "std": 0}
    rows = rows.sort_values(["pixels_sha256", "sha256"], kind="stable", ignore_index=True)  # copies side by side
    images = rows[rows["unreadable"].isna()].fillna(holes).reset_index(drop=True)
    images = images.assign(file_in=_splits_of(images, "sha256"), pixels_in=_splits_of(images, "pixels_sha256"))
    pairs = pd.MultiIndex.from_product([classes, SPLITS], names=["class", "split"])
    splits = images.groupby(["label", "split"]).size().reindex(pairs, fill_value=0).reset_index(name="images")
    by_class = splits.groupby("class", sort=False)["images"].sum().reset_index()
    by_class["times_smaller"] = by_class["images"].max() / by_class["images"].where(by_class["images"] > 0)
    return {"rows": rows, "images": images, "splits": splits, "classes": by_class}


def _splits_of(images: pd.DataFrame, column: str) -> pd.Series:
    """For every image the splits that images with the same value in `column` are in, as in `test and train`."""
    pairs = images[[column, "split"]].drop_duplicates().sort_values("split")
    leaks = pairs[pairs.duplicated(column, keep=False)].groupby(column)["split"].agg(" and ".join)
    return images[column].map(leaks).astype("str").fillna(images["split"])


def rules(params: config.Validate, classes: tuple[str, ...]) -> list[Rule]:
    """All rules on the contents of the `tables`."""
    least, most = params.min_side, params.max_side
    few, times = params.min_rows_per_class, params.max_class_imbalance
    names, one, between = {"value_set": list(classes)}, {"value_set": list(SPLITS)}, "ExpectColumnValuesToBeBetween"
    return [
        Rule("decodable", "warning", "every image can be decoded",
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
        Rule("rows", "critical", f"every class has at least {few} images in every split",
             "splits", "images", between, {"min_value": few}),
        Rule("classes", "critical", "every declared class has images",
             "classes", "images", between, {"min_value": 1}),
        Rule("balance", "warning", f"no class is more than {times:g} times smaller than the largest",
             "classes", "times_smaller", between, {"max_value": times}),
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
        observed, offending = _observed(rule, result, frame)
    else:
        raise StageError(f"{paths.MANIFEST}: {rule.name} cannot be judged; run ingest again")
    entry = {"name": rule.name, "severity": rule.severity, "passed": passed, "observed": observed}
    return {**entry, "offending": offending[:SHOWN], "sentence": _sentence(rule.says, passed, observed, offending)}


def _observed(rule: Rule, result: Json, frame: pd.DataFrame) -> tuple[Json, list[Any]]:
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


def validate(manifest: pd.DataFrame, params: config.Validate, classes: tuple[str, ...], docs: Path) -> Json:
    """The verdict on a manifest, fit for JSON; Data Docs (HTML) go to the new directory `docs`.

    It fails if any critical expectation does; a warning is told and lets pass.
    """
    set_quiet()  # read when Great Expectations is imported
    frames, wanted = {"rows": manifest}, [SCHEMA]
    if set(COLUMNS) <= set(manifest.columns):
        frames, wanted = tables(manifest, classes), [SCHEMA, *rules(params, classes)]
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
        verdict = validate(manifest, params.validate_, params.classes, docs)
    files.write_json(paths.report("validate"), verdict)
    failed = [entry for entry in verdict["expectations"] if not entry["passed"]]
    for entry in failed:
        print(f"validate: {entry['severity']}: {entry['name']}: {entry['sentence']}")
    held = f"{len(verdict['expectations']) - len(failed)} of {len(verdict['expectations'])} expectations hold"
    print(f"validate: {'passed' if verdict['passed'] else 'failed'}, {verdict['rows']} rows, {held}")


if __name__ == "__main__":
    run(main)
