"""A folder of photos through the whole job, by changing the parameters only."""

import json
import random
from pathlib import Path

import pytest
from PIL import Image
from ruamel.yaml import YAML
from workspace import REFUSED, ROOT, Workspace, checkout


@pytest.fixture
def workspace(tmp_path: Path, api: str) -> Workspace:
    checkout(tmp_path / "workspace")
    return Workspace(tmp_path / "workspace", api)


def picture(path: Path, kind: str, hue: int, rng: random.Random) -> None:
    """A photo-like image: a gradient of its class's colour with noise, in any size and format."""
    size = (rng.randint(40, 90), rng.randint(40, 90))
    base = Image.linear_gradient("L").resize(size)
    noise = Image.effect_noise(size, 60)
    bands = [Image.blend(base, noise, 0.4).point(lambda v, g=gain: v * g // 255) for gain in (hue, 255 - hue, 120)]
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.merge("RGB", bands).save(path, kind)


def test_a_folder_of_images_goes_through_by_changing_the_parameters_only(workspace: Workspace, tmp_path: Path) -> None:
    rng = random.Random(0)
    suffixes = {"JPEG": "jpg", "PNG": "png", "BMP": "bmp", "WEBP": "webp", "TIFF": "tiff"}
    for label, hue in (("red", 250), ("green", 10), ("blue", 128)):
        for index in range(60):
            kind = list(suffixes)[index % len(suffixes)]
            picture(tmp_path / "photos" / label / f"{index}.{suffixes[kind]}", kind, hue, rng)
    (tmp_path / "photos" / "red" / "broken.jpg").write_bytes(b"not an image")
    truncated = tmp_path / "photos" / "blue" / "1.png"
    truncated.write_bytes(truncated.read_bytes()[:200])
    yaml = YAML(typ="safe")
    recipe = yaml.load(ROOT / "data/recipes/folder.yaml")
    recipe["ingest"] |= {"path": str(tmp_path / "photos"), "max_corrupt_fraction": 0.05}
    recipe |= {"model": "photos"}
    recipe["validate"] |= {"min_rows_per_class": 2}
    recipe["finetune"] |= {"image_size": 32}
    recipe["finetune"]["training"] |= {"epochs": 1, "batch_size": 16}
    recipe["prune"]["recovery"]["training"] |= {"epochs": 1, "batch_size": 16}
    recipe["quantize"] |= {"calibration_images": 64}
    recipe["benchmark"] |= {"iterations": 30}
    recipe["gate"] |= {"min_top1": 0.0, "max_top1_drop": 1.0, "max_latency_ratio": 10.0}
    recipe["gate"]["slices"] = {"label": {"min_count": 1, "min_top1": 0.0}}
    yaml.dump(recipe, workspace.root / "params.yaml")
    assert workspace.run(status=REFUSED)["failed"] == ["champion"]
    decision = workspace.run("--bootstrap")
    assert (decision["outcome"], decision["model"], decision["bootstrap"]) == ("promoted", "photos", True)
    assert set(decision["stages"]["reduce"]["class_recall"]) == {"red", "green", "blue"}
    verdict = json.loads((workspace.root / "data/reports/validate.json").read_text())
    decodable = next(one for one in verdict["expectations"] if one["name"] == "decodable")
    assert {one["path"] for one in decodable["offending"]} == {"red/broken.jpg", "blue/1.png"}
