"""finetune: fit a pretrained backbone to the classes; leaves weights, ONNX, metrics and the history."""

from pathlib import Path

from torch import nn

from tasks.core import config, files, paths
from tasks.core.errors import StageError, run
from tasks.nets import backbone, masks, processes, training
from tasks.nets.backbone import Spec
from tasks.nets.export import export


def finetune(
    net: nn.Module, spec: Spec, params: config.Finetune, train: Path, val: Path, checkpoint: Path
) -> tuple[dict[str, float], list[dict[str, float]]]:
    """Train the network in place; returns its val metrics and one history row per epoch."""
    images = training.Images(train, spec.preprocessing, spec.classes, params.training.augment)
    held_out = training.Images(val, spec.preprocessing, spec.classes)
    backbone.freeze(net, params.freeze_stages)
    net.to(training.device())
    hold = masks.hold_zeros(net, backbone.head(net)) if params.weights.stage == "prune" else None
    weights = training.class_weights(params.training, images.labels)
    loss = training.cross_entropy(params.training.label_smoothing, weights)
    history = training.fit(net, images, held_out, loss, params.training, checkpoint=checkpoint, after_step=hold)
    top1, val_loss = training.evaluate(net, held_out)
    parameters = sum(p.numel() for p in net.parameters())
    found = {"val_top1": top1, "val_loss": val_loss, "parameters": parameters, "threads": processes.all_threads()}
    return found, history


def start(params: config.Params) -> tuple[nn.Module, Spec]:
    """The network before training, and its description with where the weights come from.

    Those of the production model lie in data/start, where the flow lays them; `StageError` if they do not. They are no
    DVC dependency on purpose: else every promotion would make the model stale that it promoted.
    """
    wanted, weights = params.finetune, params.finetune.weights
    origin: dict[str, str] = {"source": weights.source}
    production = None
    if weights.source == "production":
        production, name = paths.START, weights.model or params.model
        if not (production.exists() and paths.START_VERSION.exists()):
            raise StageError(f"{production} is missing: `weighin run` lays the weights of {name} in production there")
        version = paths.START_VERSION.read_text()
        origin |= {"model": name, "version": version, "sha256": files.sha256(production)}
    elif weights.source == "file":
        origin |= {"path": str(weights.path), "sha256": files.sha256(Path(str(weights.path)))}
    elif weights.source == "packaged":
        origin |= {"package": backbone.PACKAGE, "sha256": backbone.PACKAGED_SHA256}
    preprocessing = backbone.preprocessing(
        wanted.backbone, wanted.image_size, background=params.ingest.background, white_level=params.ingest.white_level
    )
    classes = config.class_names(params)
    spec = Spec(backbone=wanted.backbone, classes=classes, preprocessing=preprocessing, weights=origin)
    net = backbone.load_pretrained(wanted, spec, production)
    backbone.check_size(net, spec)
    return net, spec


def main() -> None:
    params = config.load()
    verdict = files.read_json(paths.report("validate"))
    if verdict.get("passed") is not True:
        raise StageError(f"{paths.report('validate')} says that the data did not pass: nothing is trained on it")
    if processes.run_together(main, params.finetune.training.devices):
        return
    training.make_deterministic(params.finetune.training.seed, params.finetune.training.threads)
    net, spec = start(params)
    checkpoint = training.checkpoint_path("finetune", paths.TRAIN, paths.VAL, described_by=(params.finetune, spec))
    metrics, history = finetune(net, spec, params.finetune, paths.TRAIN, paths.VAL, checkpoint)
    processes.end_helpers()
    backbone.save(net, spec, paths.weights("finetune"), paths.spec("finetune"))
    export(net, spec, paths.onnx("finetune"))
    training.write_history(paths.history("finetune"), history)
    files.write_json(paths.report("finetune"), metrics)
    files.forget("finetune")
    print(f"finetune: val top-1 {metrics['val_top1']:.2%} after {len(history)} epochs")


if __name__ == "__main__":
    run(main)
