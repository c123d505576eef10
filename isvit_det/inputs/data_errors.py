"""Errors of data, in one line that names the image and the step."""
import contextlib
from typing import Any, Iterable, Iterator, List, Mapping, Optional

from mmdet.datasets import CocoDataset
from mmdet.registry import DATASETS
from mmengine.dataset import Compose
from mmengine.hooks import Hook
from mmengine.runner import Runner

from isvit_det.core.errors import QuantError, describe_error
from isvit_det.core.files import disk_error
from isvit_det.inputs.annotations import (KEYS, entry_without,
                                          raise_annotation_error, short)

SHOWN_IMAGES = 3


class GuardedPipeline(Compose):
    """The transforms of a data set, with errors that name the image.

    Worker processes use it, too.

    Args:
        pipeline: of a built data set.
        ann_file: its annotation file, if it has one.
        may_skip: whether an image that a transform drops may be replaced by
            another one, as in training.
    """

    def __init__(self,
                 pipeline: Any,
                 ann_file: str = '',
                 may_skip: bool = False) -> None:
        super().__init__(None)
        self.transforms = list(getattr(pipeline, 'transforms', [pipeline]))
        self.ann_file = ann_file
        self.may_skip = may_skip

    def __call__(self, data: Any) -> Any:
        name = image_name(data)
        for transform in self.transforms:
            step = type(transform).__name__
            before = data
            try:
                data = transform(data)
            except QuantError:
                raise
            # A transform may be the user's code, and raise any exception.
            except Exception as error:
                raise self._error(step, name, before, error) from error
            if data is None:
                if self.may_skip:
                    return None
                raise QuantError(f'data set: image {name}: the transform '
                                 f'{step} drops it; leave that transform '
                                 'out, or the image.')
        return data

    def _error(self, step: str, name: str, data: Any,
               error: Exception) -> QuantError:
        message = _one_line(error)
        if isinstance(error, OSError) and error.errno is not None:
            place = '' if name in message else f'image {name}: '
            return QuantError(f'data set: {place}{message}; check data_root '
                              'and data_prefix.')
        # From mmcv's LoadImageFromFile for an unreadable image, and from
        # OpenCV for an empty one.
        if ('failed to load image' in message or '!buf.empty()' in message
                or isinstance(error, OSError)):
            return QuantError(f'data set: image {name}: {step} failed to load '
                              'it; it is empty or damaged, get it again.')
        if isinstance(error, KeyError) and isinstance(data, Mapping):
            fault = self._annotation_fault(data, error)
            if fault is not None:
                return QuantError(
                    f'data set: image {name}: the transform {step} needs '
                    f'{fault}; add it, or leave that transform out of the '
                    'test pipeline.')
        return QuantError(f'data set: image {name}{_size_of(data)}: the '
                          f'transform {step} failed '
                          f'({describe_error(error)}); mend the image or its '
                          'annotations, or the pipeline.')

    def _annotation_fault(self, data: Mapping[str, Any],
                          error: KeyError) -> Optional[str]:
        """What the objects of an image lack, if this causes an error."""
        key = error.args[0] if error.args else None
        if key not in KEYS or all(
                key in one for one in data.get('instances', [])):
            return None
        return lacking(self.ann_file, data, key)


def guard_(dataset: Any, may_skip: bool) -> None:
    """Make the pipeline of a data set name the image on which it fails.

    Args:
        dataset: a built data set, no wrapper.
        may_skip: see ``GuardedPipeline``.
    """
    pipeline = getattr(dataset, 'pipeline', None)
    if pipeline is not None and not isinstance(pipeline, GuardedPipeline):
        ann_file = str(getattr(dataset, 'ann_file', ''))
        dataset.pipeline = GuardedPipeline(pipeline, ann_file, may_skip)


def data_set_error(config: Mapping[str, Any], error: Exception) -> QuantError:
    """The error for a data set that cannot be built.

    Args:
        config: of the data set.
        error: the exception of building it.
    """
    kind = str(config.get('type'))
    problem = QuantError(f'data set: {kind}: {describe_error(error)}; mend '
                         'its config or its files.')
    try:
        dataset = DATASETS.build(dict(config, lazy_init=True))
    # Its arguments are wrong, as the error says.
    except Exception:
        return problem
    path = str(getattr(dataset, 'ann_file', ''))
    if isinstance(dataset, CocoDataset):
        parse = type(dataset).parse_data_info
        try:
            raise_annotation_error(path, error, parse
                                   is CocoDataset.parse_data_info)
        except QuantError as fault:
            return fault
    entry = _failing_entry(dataset)
    if not path or entry is None:
        return problem
    return QuantError(f'annotation file: {path}: {type(dataset).__name__} '
                      f'cannot read the entry {entry} '
                      f'({describe_error(error)}); mend it.')


def _failing_entry(dataset: Any) -> Optional[str]:
    """The entry that a data set cannot parse, shortened, if there is one."""
    parse = dataset.parse_data_info
    current: List[Any] = []

    def parse_and_record(raw: Any) -> Any:
        current[:] = [raw]
        parsed = parse(raw)
        current.clear()
        return parsed

    dataset.parse_data_info = parse_and_record
    with contextlib.suppress(Exception):
        dataset.full_init()
    if not current:
        return None
    raw = current[0]
    # An entry with an image and its objects is identified by the image.
    return short(
        raw.get('raw_img_info', raw) if isinstance(raw, dict) else raw)


@contextlib.contextmanager
def preprocessing(data: Any) -> Iterator[None]:
    """Name the images of a batch if the data preprocessor fails on them."""
    try:
        yield
    except QuantError:
        raise
    except Exception as error:
        raise QuantError(f'data set: image {", ".join(names(data))}: the '
                         "detector's data_preprocessor failed "
                         f'({describe_error(error)}); mend the image or the '
                         'config.') from error


def lacking(ann_file: str, info: Mapping[str, Any], key: str) -> str:
    """A description of what the objects of an image lack.

    Args:
        ann_file: of the data set.
        info: information on the image.
        key: of an object, as in MMDetection's data sets.
    """
    key, entry = KEYS[key], None
    with contextlib.suppress(QuantError):
        entry = entry_without(ann_file, info.get('img_id'), key)
    where = entry or f'an object of image {info.get("img_id")}'
    return f'{key!r}, which {where} of annotation file {ann_file} lacks'


def image_name(data: Any) -> str:
    """The path of an image, or its id."""
    if isinstance(data, Mapping):
        for key in ('img_path', 'img_id', 'sample_idx'):
            if data.get(key) is not None:
                return str(data[key])
    return 'without a path'


def _size_of(data: Any) -> str:
    shape = data.get('ori_shape') if isinstance(data, Mapping) else None
    return f' of {shape[1]} x {shape[0]} pixels' if shape else ''


def _one_line(error: BaseException) -> str:
    return ' '.join(str(error).split()) or type(error).__name__


def last_line(error: BaseException) -> str:
    """The message of an error without the traceback of a worker process."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].split('QuantError: ')[-1]


@contextlib.contextmanager
def loading_errors(loader: str) -> Iterator[None]:
    """Turn exceptions of a data loader into QuantErrors.

    Args:
        loader: key of the loader in the config.
    """
    try:
        yield
    except QuantError as error:
        raise QuantError(last_line(error)) from error
    except Exception as error:
        if 'DataLoader worker' in str(error):
            raise QuantError(
                f'{loader}: a process that reads images was ended '
                f'({_one_line(error)}), often for want of memory; set '
                f'{loader}.num_workers=0, or to fewer.') from error
        raise QuantError(f'{loader}: it cannot read its data set '
                         f'({describe_error(error)}).') from error


def read(batches: Iterable[Any], loader: str) -> Iterator[Any]:
    """Iterate over the batches of a data loader.

    Args:
        batches: the loader.
        loader: key of the loader in the config.

    Raises:
        QuantError: naming an image that cannot be read.
    """
    with loading_errors(loader):
        iterator = iter(batches)
    end = object()
    while True:
        with loading_errors(loader):
            batch = next(iterator, end)
        if batch is end:
            return
        yield batch


@contextlib.contextmanager
def predicting(batch: Any) -> Iterator[None]:
    """Name the images of a batch if the detector fails on them."""
    try:
        yield
    except QuantError:
        raise
    # A detector may be the user's code, and raise any exception.
    except Exception as error:
        raise QuantError(
            f'test_dataloader: image {", ".join(names(batch))}: the detector '
            f'failed on it ({describe_error(error)}); mend or leave out the '
            'image.') from error


class TestWatch(Hook):
    """Records the batch of a test, to name its images if the test fails.

    Attributes:
        batch: the batch on which the detector runs; None between batches.
        left: number of batches that are not predicted yet.
    """
    __test__ = False
    priority = 'LOWEST'

    def __init__(self) -> None:
        self.batch: Any = None
        self.left = 0

    def before_test_epoch(self, runner: Runner) -> None:
        self.batch, self.left = None, len(runner.test_dataloader)

    def before_test_iter(self,
                         runner: Runner,
                         batch_idx: int,
                         data_batch: Any = None) -> None:
        self.batch = data_batch

    def after_test_iter(self,
                        runner: Runner,
                        batch_idx: int,
                        data_batch: Any = None,
                        outputs: Any = None) -> None:
        self.batch = None
        self.left -= 1

    @contextlib.contextmanager
    def errors(self) -> Iterator[None]:
        """Turn exceptions of a test on an image into QuantErrors.

        Exceptions before the first and after the last image stay.
        """
        self.batch, self.left = None, 0
        try:
            yield
        except QuantError as error:
            raise QuantError(last_line(error)) from error
        except Exception as error:
            full = disk_error(error)
            if full is not None:
                raise full from error
            if self.batch is not None:
                with predicting(self.batch):
                    raise
            if self.left:
                with loading_errors('test_dataloader'):
                    raise
            raise


def names(batch: Any) -> List[str]:
    """Paths of the first images of a batch."""
    samples = batch.get('data_samples') if isinstance(batch, Mapping) else None
    if isinstance(samples, Mapping) or samples is None:
        return ['without a path']
    # With test-time augmentation, each image has several samples.
    samples = [one[0] if isinstance(one, list) else one for one in samples]
    shown = [
        image_name(getattr(one, 'metainfo', {}))
        for one in samples[:SHOWN_IMAGES]
    ]
    return shown + ['...'] * (len(samples) > SHOWN_IMAGES)
