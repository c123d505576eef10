#!/usr/bin/env python
"""What the demo's detector finds in a drawn picture: float, 4 and 3 bits.

Each detector in few bits is a run of quantize_det in a folder of its
own, which is not run again once it is done. Detections of a score of at least
0.5 are drawn, side by side.
"""
import argparse
import json
import sys
from pathlib import Path
from typing import List, NamedTuple, Sequence

import cv2
import numpy as np
from mmdet.apis import inference_detector, init_detector

from isvit_det.commands.cells import QUANTIZE_DET, Cell
from isvit_det.commands.console import run_command
from isvit_det.core.files import write_atomically
from isvit_det.datasets.drawing import CLASSES
from isvit_det.inputs.configs import load_config

FLOAT = 'configs/drawn/mask-rcnn_swin-mini_fpn_drawn'
CONFIG = 'configs/drawn/mask-rcnn_swin-mini_fpn_isvit-w4a4_drawn.py'
OUT = Path('docs/images/bits.jpg')
SCORE = .5
# Of masks.
OPACITY = .4
# Of the picture's size.
SCALE = 2
TITLE_HEIGHT = 34
GAP = 10
QUALITY = 85
FONT = cv2.FONT_HERSHEY_SIMPLEX


class Detections(NamedTuple):
    """Detections of one picture.

    Attributes:
        boxes: (N, 4), left, top, right, bottom in pixels.
        masks: (N, H, W) of bool.
        labels: (N,) of classes.
        scores: (N,).
    """
    boxes: np.ndarray
    masks: np.ndarray
    labels: np.ndarray
    scores: np.ndarray


def detect(config: str, checkpoint: str, path: Path) -> Detections:
    """Detections of a detector in a picture, with a score of 0.5 at least."""
    model = init_detector(config, checkpoint, device='cpu')
    instances = inference_detector(model, str(path)).pred_instances
    instances = instances[instances.scores >= SCORE].numpy()
    return Detections(instances.bboxes, instances.masks.astype(bool),
                      instances.labels, instances.scores)


def color_of(label: int) -> np.ndarray:
    """A class's own colour in BGR, one of as many hues as classes."""
    hue = np.array([[[180 * label // len(CLASSES), 230, 255]]], np.uint8)
    return cv2.cvtColor(hue, cv2.COLOR_HSV2BGR)[0, 0].astype(np.float32)


def draw(pixels: np.ndarray, detections: Detections, title: str) -> np.ndarray:
    """A picture (H, W, 3), enlarged, with its detections and a title."""
    size = pixels.shape[1] * SCALE, pixels.shape[0] * SCALE
    canvas = cv2.resize(pixels, size, interpolation=cv2.INTER_CUBIC)
    canvas = canvas.astype(np.float32)
    for mask, label in zip(detections.masks, detections.labels):
        inside = cv2.resize(mask.astype(np.uint8), size) > 0
        canvas[inside] += OPACITY * (color_of(label) - canvas[inside])
    canvas = canvas.astype(np.uint8)
    for box, label, score in zip(detections.boxes, detections.labels,
                                 detections.scores):
        left, top, right, bottom = (int(side) for side in SCALE * box)
        color = color_of(label).tolist()
        cv2.rectangle(canvas, (left, top), (right, bottom), color, 2)
        text = f'{CLASSES[label]} {score:.2f}'
        place = left + 3, max(top + 13, 13)
        cv2.putText(canvas, text, place, FONT, .42, (0, 0, 0), 3, cv2.LINE_AA)
        cv2.putText(canvas, text, place, FONT, .42, (255, 255, 255), 1,
                    cv2.LINE_AA)
    head = np.full((TITLE_HEIGHT, size[0], 3), 255, np.uint8)
    cv2.putText(head, title, (4, 23), FONT, .65, (0, 0, 0), 1, cv2.LINE_AA)
    return np.vstack([head, canvas])


def side_by_side(panels: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures of one height with white between them."""
    gap = np.full((len(panels[0]), GAP, 3), 255, np.uint8)
    rows: List[np.ndarray] = []
    for panel in panels:
        rows += [panel, gap]
    return np.hstack(rows[:-1])


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    add = parser.add_argument
    add('--image', type=int, default=49, help='number in the evaluation set')
    add('--bits', nargs='+', default=['w4a4', 'w3a3'])
    add('--work-dir', type=Path, default=Path('work_dirs/picture'))
    add('--out', type=Path, default=OUT)
    return parser.parse_args()


def main() -> None:
    args = parse_args()
    weights = Path(f'{FLOAT}.pth')
    folders = [args.work_dir / bits for bits in args.bits]
    results = [
        Cell(QUANTIZE_DET,
             [CONFIG, str(weights), '--bits', bits, '--no-float-eval'], folder,
             weights).run() for bits, folder in zip(args.bits, folders)
    ]
    dataset = load_config(CONFIG, None).test_dataloader.dataset
    root = Path(dataset.data_root)
    images = json.loads((root / dataset.ann_file).read_text())['images']
    path = root / dataset.data_prefix.img / images[args.image]['file_name']
    pixels = cv2.imread(str(path))
    assert pixels is not None
    detections = detect(f'{FLOAT}.py', str(weights), path)
    size = results[0]['bytes']['float'] / 1e6
    panels = [draw(pixels, detections, f'float, {size:.1f} MB')]
    for folder, result in zip(folders, results):
        detections = detect(
            str(folder / Path(CONFIG).name), str(folder / 'packed.pth'), path)
        size = result['bytes']['packed'] / 1e6
        panels.append(
            draw(pixels, detections, f'{result["bits"]}, {size:.1f} MB'))
    ok, content = cv2.imencode('.jpg', side_by_side(panels),
                               [cv2.IMWRITE_JPEG_QUALITY, QUALITY])
    assert ok
    write_atomically(args.out, lambda file: file.write(content.tobytes()))
    print(f'{args.out}: {path.name}, {len(content) / 1e3:.0f} kB')


if __name__ == '__main__':
    sys.exit(run_command(main))
