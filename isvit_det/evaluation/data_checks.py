"""Checks of the evaluation's data before any image is predicted."""
import contextlib
import os
from pathlib import Path
from typing import Any, Iterator, List, Mapping, Optional, Sequence, Set, Tuple

from mmdet.datasets import CocoDataset
from mmdet.datasets.transforms import LoadAnnotations
from mmdet.evaluation import CocoMetric
from mmengine.config import Config
from mmengine.dataset import BaseDataset
from mmengine.runner import Runner
from PIL import Image

from isvit_det.core.errors import QuantError
from isvit_det.evaluation.ground_truth import Annotations
from isvit_det.evaluation.tasks import (is_coco, metric_class, metric_configs,
                                        truth_files)
from isvit_det.inputs.annotations import (raise_annotation_error,
                                          read_annotations)
from isvit_det.inputs.data_errors import guard_, lacking
from isvit_det.inputs.datasets import (base_datasets, build_dataset,
                                       dataset_of, unwrap)
from isvit_det.inputs.truth_checks import (check_dataset, check_metric,
                                           measures_masks)

# EXIF tag of the orientation; from 5 on, height and width are swapped.
ORIENTATION = 0x0112
Size = Tuple[int, int]


@contextlib.contextmanager
def test_data_errors(cfg: Config) -> Iterator[None]:
    """Find the wrong file if a config's test loop cannot be built here.

    Raises:
        QuantError: naming the file.
    """
    try:
        yield
    except (QuantError, FileNotFoundError):
        raise
    except Exception as error:
        loader = cfg['test_dataloader']
        for config in base_datasets(dataset_of(loader, 'test_dataloader')):
            build_dataset(config)
        for config in metric_configs(cfg):
            path = config.get('ann_file')
            if path is not None and is_coco(metric_class(config)):
                raise_annotation_error(path, error,
                                       metric_class(config) is CocoMetric)
        raise


def check_test_data(runner: Runner,
                    truth: Sequence[Optional[Annotations]]) -> List[str]:
    """Check the data of an evaluation, as far as that is cheap.

    The annotations are read as the metrics read them. Every image file is
    opened, and some images are prepared as in the test: the first one, the
    one with the highest aspect ratio, and those that Pillow cannot read. From
    then on, the pipelines of the data sets name the image on which they fail.

    Args:
        runner: its test loop evaluates.
        truth: annotation files of its metrics.

    Returns:
        Sentences on disagreements that are no errors; they are logged, too.

    Raises:
        QuantError: naming the file and what is wrong with it.
    """
    notes: List[str] = []
    try:
        for note in _faults(runner, truth):
            notes.append(note)
    finally:
        for note in notes:
            runner.logger.warning(note)
    return notes


def _faults(runner: Runner,
            truth: Sequence[Optional[Annotations]]) -> Iterator[str]:
    """Sentences on disagreements that ``check_test_data`` accepts."""
    loop, paths = runner.test_loop, truth_files(runner.cfg)
    measuring = list(map(measures_masks, loop.evaluator.metrics))
    masks = any(measuring)
    # Metrics without a file use the masks of the data set.
    is_drawn = any(drawn and not path for drawn, path in zip(measuring, paths))
    contents = {file.path: file.content for file in truth if file is not None}
    # Other classes of data sets have no list of images.
    datasets = [
        dataset for dataset in unwrap(loop.dataloader.dataset)
        if isinstance(dataset, BaseDataset) and len(dataset)
    ]
    tried = []
    # Sizes are checked first, since the other checks depend on them.
    for dataset in datasets:
        guard_(dataset, may_skip=not dataset.test_mode)
        note, indices = _look_up(dataset, masks)
        tried.append(indices)
        if note is not None:
            yield note
    for metric, path in zip(loop.evaluator.metrics, paths):
        yield from check_metric(metric, path or 'of the data set')
    for dataset, indices in zip(datasets, tried):
        used = is_drawn or _reads_masks(dataset.pipeline)
        check_dataset(dataset, _content(dataset, contents), used, is_drawn)
        for index in indices:
            dataset[index]


def _content(dataset: Any, contents: Mapping[str, Any]) -> Any:
    """Content of a data set's annotation file; None if it is not COCO's."""
    if not isinstance(dataset, CocoDataset):
        return None
    path = str(dataset.ann_file)
    if path not in contents and Path(path).is_file():
        return read_annotations(path)
    return contents.get(path)


def _look_up(dataset: BaseDataset,
             masks: bool) -> Tuple[Optional[str], List[int]]:
    """Open the image files of a data set.

    Args:
        dataset: the data set.
        masks: whether a metric measures masks.

    Returns:
        A sentence on wrong sizes, if there are any, and the indices of the
        images to prepare.
    """
    reads_masks = _reads_masks(dataset.pipeline)
    longest: Tuple[float, int] = (0., 0)
    unread: Set[int] = set()
    others: List[str] = []
    for index in range(len(dataset)):
        info = dataset.get_data_info(index)
        if reads_masks and any('mask' not in one
                               for one in info.get('instances', [])):
            raise QuantError(
                f'data set: image {info.get("img_path")}: the transform '
                'LoadAnnotations needs '
                f'{lacking(dataset.ann_file, info, "mask")}; add it, or give '
                'that transform with_mask=False in the test pipeline.')
        sizes = _picture_sizes(info)
        if sizes:
            ratio = max(sizes[0]) / min(sizes[0])
            longest = max(longest, (ratio, index))
            fault = _contradiction(info, sizes, masks or reads_masks)
            if fault and masks:
                raise QuantError(f'data set: {fault}; mend '
                                 f'{dataset.ann_file}, masks of another size '
                                 'are matched with nothing.')
            others += [fault] if fault else []
        elif _is_picture(info):
            unread.add(index)
    note = None
    if others:
        note = f'data set: {others[0]}, and {len(others) - 1} more such images'
    return note, sorted({0, longest[1]} | unread)


def _reads_masks(pipeline: Any) -> bool:
    """Whether a pipeline loads the masks of every object."""
    if type(pipeline) is LoadAnnotations:
        return pipeline.with_mask
    parts = getattr(pipeline, 'transforms', [])
    if not isinstance(parts, (list, tuple)):
        return False
    return any(map(_reads_masks, parts))


def _picture_sizes(info: Mapping[str, Any]) -> List[Size]:
    """Height and width of an image file; empty if they are not known.

    Two pairs if the file has an orientation, because the reader of the data
    set may or may not rotate the image.

    Raises:
        QuantError: if the file does not exist or is empty.
    """
    path = str(info.get('img_path') or '')
    if not path or '://' in path:
        return []
    try:
        length = os.stat(path).st_size
    except OSError as error:
        raise QuantError(f'data set: image {path} cannot be read '
                         f'({error.strerror}); check data_prefix.') from error
    if Path(path).is_file() and length == 0:
        raise QuantError(f'data set: image {path} is empty, it has no bytes; '
                         'it is damaged, get it again.')
    try:
        with Image.open(path) as picture:
            width, height = picture.size
            turned = picture.getexif().get(ORIENTATION, 1) >= 5
    # The pipeline may be able to read what Pillow cannot.
    except Exception:
        return []
    if not height or not width:
        return []
    size = height, width
    return [size[::-1], size] if turned else [size]


def _is_picture(info: Mapping[str, Any]) -> bool:
    """Whether a local file has the extension of an image format of Pillow.

    If Pillow cannot read it, it is damaged, or it needs another reader.
    """
    path = Path(str(info.get('img_path') or ''))
    return (path.suffix.lower() in Image.registered_extensions()
            and path.exists())


def _contradiction(info: Mapping[str, Any], sizes: Sequence[Size],
                   masks: bool) -> Optional[str]:
    """A sentence if the annotations of an image give another size."""
    stated: Any = (info.get('height'), info.get('width'))
    path, size = info.get('img_path'), sizes[0]
    if None not in stated and stated not in sizes:
        return (f'image {path} is {size[0]} high and {size[1]} wide, and its '
                f'annotations say {stated[0]} and {stated[1]}')
    for one in info.get('instances', []) if masks else []:
        mask = one.get('mask')
        stated = mask.get('size') if isinstance(mask, dict) else None
        if isinstance(stated, list) and tuple(stated) not in sizes:
            return (f'image {path} is {size[0]} high and {size[1]} wide, and '
                    f'a mask of it is of size {stated}')
    return None
