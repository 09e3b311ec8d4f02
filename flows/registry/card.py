"""The model card of a decision, Markdown."""

from collections.abc import Iterable, Iterator

from flows.registry.decision import Benchmark, Decision
from flows.registry.markdown import escape, row, span, table
from flows.registry.parameters import Recorded
from tasks.gate import Check


def model_card(decision: Decision, checks: Iterable[Check], benchmark: Benchmark, params: Recorded) -> str:
    """The model card, Markdown."""
    weighed = benchmark.stages | ({"champion": benchmark.champion} if benchmark.champion else {})
    sections = {
        "Intended use": [f"- {line}" for line in (*uses(params, benchmark), *limitations(params))],
        "Stages": [
            *table("stage", "top-1", "size", "latency (p50)"),
            *(
                row(name, f"{one.top1:.2%}", f"{one.size_bytes:,} B", f"{one.latency_p50_ms:.3f} ms")
                for name, one in weighed.items()
            ),
        ],
        "Checks": [
            *table("check", "where", "value", "operator", "limit", "passed"),
            *(
                row(
                    one.name,
                    one.where or "",
                    _cell(one.value),
                    one.operator,
                    _cell(one.limit),
                    "yes" if one.passed else "no",
                )
                for one in checks
            ),
        ],
        "Provenance": _origin(decision, params),
    }
    lines = [f"# {decision.model} {decision.version or f'({decision.outcome})'}", "", *_outcome(decision, params)]
    for title, body in sections.items():
        lines += ["", f"## {title}", "", *body]
    return "\n".join([*lines, ""])


def _outcome(decision: Decision, params: Recorded) -> list[str]:
    lines = [
        f"{decision.outcome.capitalize()} on {decision.created} by {span(decision.by or 'unknown')}"
        + (f", in place of {decision.replaces}." if decision.replaces else ".")
    ]
    if decision.reason is not None:
        lines += ["", f"Reason: {escape(decision.reason)}"]
    if decision.failed:
        lines += ["", f"Failed checks: {escape(', '.join(decision.failed))}."]
    return lines + [line for trade in trades(decision, params) for line in ("", trade)]


def trades(decision: Decision, params: Recorded) -> Iterator[str]:
    if decision.bootstrap:
        yield "There was no champion: nothing was in production that the model could be compared with."
    champion = params.gate.champion
    if decision.traded and champion:
        yield (
            "Accuracy was traded for size or speed: the model may be worse than the champion by more than the usual "
            f"margin of {champion.margin:g} in top-1"
            + (f", within the {champion.trade.margin:g} that holds for a trade." if champion.trade else ".")
        )


def uses(params: Recorded, benchmark: Benchmark) -> Iterator[str]:
    names, side = params.classes or benchmark.classes, params.finetune.image_size
    yield (f"Images scaled to {side}x{side} pixels, each of one class of {len(names)}: {escape(', '.join(names))}.")


def limitations(params: Recorded) -> Iterator[str]:
    yield "An image of anything else gets one of these classes too, and the scores are not calibrated probabilities."
    yield "Top-1 is that of a test split from the same source as the training images, and tells nothing of others."
    yield f"Looked at one by one: the values of {escape(', '.join(params.gate.slices) or 'no column')}."
    yield "Latencies are those of the machine that metrics.json names, at batch 1."


def _origin(decision: Decision, params: Recorded) -> list[str]:
    code, ingest = decision.code, params.ingest
    return [
        f"- model SHA-256: `{decision.model_sha256}`",
        f"- test data SHA-256: `{decision.data_sha256}`",
        f"- parameters SHA-256: `{decision.params_sha256}`",
        f"- verdict SHA-256: `{decision.verdict_sha256}`",
        f"- code SHA-256: `{decision.code_sha256}`",
        f"- code: commit `{code.commit or 'unknown'}`" + (" with changes that are not committed" if code.dirty else ""),
        f"- signed with the key `{decision.signer or 'none'}`",
        f"- images: {span(ingest.path)} ({ingest.kind})",
        f"- starting weights: {span(params.finetune.backbone)} ({params.finetune.weights.source})",
        "- materials: `bom.cdx.json` lists them, `provenance.json` names every file by its SHA-256",
        "- licence: the terms of these images and starting weights hold for the model made from them",
    ]


def _cell(cell: object) -> object:
    return "missing" if cell is None else f"{cell:.6g}" if isinstance(cell, float) else cell
