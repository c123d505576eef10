"""Annotation files in COCO's format: reading and checking their entries."""
import json
import sys
from pathlib import Path
from typing import (Any, Callable, Dict, Iterator, List, Mapping, NamedTuple,
                    Optional, Sequence, Union)

from isvit_det.core.errors import QuantError

SECTIONS = ('images', 'annotations', 'categories')
# Keys that have another name in MMDetection's data sets than in the file.
KEYS = {'mask': 'segmentation', 'bbox_label': 'category_id', 'img_id': 'id'}
Path_ = Union[str, Path]


class Need(NamedTuple):
    """A requirement on an entry.

    Attributes:
        key: that the entry must have.
        form: form of the value, in words.
        fits: whether a value has that form.
    """
    key: str
    form: str
    fits: Callable[[Any], bool]


def _is_number(value: Any) -> bool:
    return (isinstance(value, (int, float)) and not isinstance(value, bool)
            and abs(value) <= sys.float_info.max)


def _is_area(value: Any) -> bool:
    return _is_number(value) and value >= 0


def _is_box(value: Any) -> bool:
    return (isinstance(value, (list, tuple)) and len(value) == 4
            and all(map(_is_number, value)) and min(value[2:]) >= 0)


def _is_id(value: Any) -> bool:
    return isinstance(value, (int, str)) and not isinstance(value, bool)


def _is_object_id(value: Any) -> bool:
    return type(value) is int and value != 0


ID = Need('id', 'a number', _is_id)
AREA = Need('area', 'a number of 0 or more', _is_area)
BOX = Need('bbox',
           'four numbers [x, y, width, height], the last two of 0 or more',
           _is_box)
CROWD = Need('iscrowd', '0 or 1', lambda value: value in (0, 1))
SHAPE = [Need(key, 'a number', _is_number) for key in ('height', 'width')]
# Its form is checked in another module (geometry).
MASK = Need('segmentation', 'polygons, or a dict with size and counts',
            lambda value: True)
OBJECT_ID = Need(
    'id', "a whole number other than 0, which pycocotools' COCOeval takes for "
    'an object without a match; number the annotations from 1', _is_object_id)
LINKS = [
    Need(key, 'the id of one', _is_id) for key in ('image_id', 'category_id')
]
OBJECT = [ID, *LINKS]
CATEGORY = [ID, Need('name', 'a text', lambda value: isinstance(value, str))]
# What MMDetection's CocoDataset reads, and what pycocotools reads.
DATASET: Dict[str, List[Need]] = dict(
    images=[
        ID,
        Need('file_name', 'a text', lambda value: isinstance(value, str)),
        *SHAPE
    ],
    annotations=[*OBJECT, BOX, AREA],
    categories=CATEGORY)
METRIC: Dict[str, List[Need]] = dict(
    images=[ID],
    annotations=[OBJECT_ID, *LINKS, BOX, AREA, CROWD],
    categories=CATEGORY)


def read_annotations(path: Path_) -> Dict[str, Any]:
    """Read an annotation file.

    Raises:
        QuantError: if it is no JSON, or does not have COCO's lists.
    """
    try:
        content = json.loads(Path(path).read_bytes())
    except OSError as error:
        raise QuantError(f'annotation file: {path} cannot be read '
                         f'({error.strerror}); check ann_file.') from error
    except ValueError as error:
        size = Path(path).stat().st_size
        why = 'it is empty' if size == 0 else f'it is no JSON ({error})'
        raise QuantError(f'annotation file: {path}: {why}; give one in '
                         "COCO's format.") from error
    check_layout(path, content)
    return content


def check_layout(path: Path_, content: Any) -> None:
    """Raise unless a file has COCO's lists of entries.

    The list of annotations may be missing.
    """
    if not isinstance(content, dict):
        raise QuantError(
            f'annotation file: {path} holds a {type(content).__name__}; '
            f'expected a dict with {", ".join(SECTIONS)}.')
    for section in SECTIONS:
        if section not in content and section != 'annotations':
            raise QuantError(f'annotation file: {path} has no {section!r}; '
                             f'expected a dict with {", ".join(SECTIONS)}.')
        entries = content.get(section, [])
        if not isinstance(entries, list):
            raise QuantError(f'annotation file: {path}: {section!r} is a '
                             f'{type(entries).__name__}, expected a list.')


def check_entries(path: Path_,
                  content: Mapping[str, Any],
                  needs: Mapping[str, Sequence[Need]],
                  counts: Callable[[Any], bool] = lambda entry: True) -> None:
    """Raise unless all entries of a file satisfy requirements.

    Args:
        path: of the file.
        content: of the file.
        needs: requirements on the entries, by list.
        counts: whether an annotation is read.

    Raises:
        QuantError: naming the file, the first wrong entry, and what it lacks.
    """
    for section in SECTIONS:
        for place, entry in enumerate(content.get(section, [])):
            name = entry_name(section, place, entry)
            if not isinstance(entry, dict):
                raise QuantError(f'annotation file: {path}: {name} is '
                                 f'{entry!r}, expected a dict.')
            if section == 'annotations' and not counts(entry):
                continue
            for need in needs[section]:
                if need.key not in entry:
                    raise missing(path, name, need.key, need.form)
                if not need.fits(entry[need.key]):
                    raise wrong(path, name, entry, need.key, need.form)


def is_read(entry: Mapping[str, Any]) -> bool:
    """Whether MMDetection's data sets read an annotation."""
    return not entry.get('ignore')


def wrong(path: Path_, name: str, entry: Mapping[str, Any], key: str,
          form: str) -> QuantError:
    """The error for an entry with a wrong value."""
    return QuantError(f'annotation file: {path}: {name} has {key!r} '
                      f'{short(entry[key])}, expected {form}; mend the '
                      'entry.')


def missing(path: Path_, name: str, key: str, form: str = '') -> QuantError:
    """The error for an entry without a key."""
    what = f' ({form})' if form else ''
    return QuantError(f'annotation file: {path}: {name} has no {key!r}{what}; '
                      'add it to all entries that lack it.')


def entry_name(section: str, place: int, entry: Any) -> str:
    """Name of an entry in messages.

    >>> entry_name('annotations', 4, dict(id=7, image_id=2))
    'annotations[4] (id 7, image_id 2)'
    """
    known = [
        f'{key} {entry[key]}' for key in ('id', 'image_id', 'file_name')
        if isinstance(entry, dict) and key in entry
    ]
    return f'{section}[{place}]' + (f' ({", ".join(known)})' if known else '')


def short(value: Any) -> str:
    """A value as text, shortened."""
    text = repr(value)
    return text if len(text) < 60 else f'{text[:57]}...'


def raise_annotation_error(path: Path_, error: BaseException,
                           is_plain: bool) -> None:
    """Raise a QuantError if an annotation file is the cause of an error.

    Args:
        path: of the file.
        error: the error of its reader.
        is_plain: whether the reader is MMDetection's ``CocoDataset`` or
            ``CocoMetric``, whose requirements are known.
    """
    content = read_annotations(path)
    if isinstance(error, KeyError) and error.args:
        key = KEYS.get(error.args[0], error.args[0])
        for section in SECTIONS:
            entries = content.get(section, [])
            lacking = [
                place for place, entry in enumerate(entries)
                if isinstance(entry, dict) and key not in entry
            ]
            # If no entry has the key, it may belong to another list.
            known = section in _sections_of(key)
            if lacking and (known or len(lacking) < len(entries)):
                name = entry_name(section, lacking[0], entries[lacking[0]])
                raise missing(path, name, key) from error
    if is_plain:
        check_entries(path, content, DATASET, is_read)


def _sections_of(key: str) -> Iterator[str]:
    """The lists whose entries need a key."""
    for section, needs in METRIC.items():
        if key in [need.key for need in (*needs, *DATASET[section])]:
            yield section


def entry_without(path: Path_, image_id: Any, key: str) -> Optional[str]:
    """Name of an image's first annotation without a value, if there is one."""
    content = read_annotations(path)
    for place, entry in enumerate(content.get('annotations', [])):
        if entry.get('image_id') == image_id and not entry.get(key):
            return entry_name('annotations', place, entry)
    return None
