"""Annotation files: the line names file, entry and what is missing."""
import copy
import json

import numpy as np
import pytest
from mmdet.evaluation import CocoMetric
from mmdet.registry import DATASETS
from mmengine.registry import init_default_scope
from pycocotools import mask as coco_mask

from isvit_det.core.errors import QuantError
from isvit_det.inputs.annotations import read_annotations
from isvit_det.inputs.datasets import build_dataset
from isvit_det.inputs.geometry import run_lengths
from isvit_det.inputs.truth_checks import check_dataset, check_metric

CONTENT = dict(
    images=[
        dict(id=i, file_name=f'{i}.png', height=40, width=50) for i in (1, 2)
    ],
    annotations=[
        dict(
            id=10 + i,
            image_id=i,
            category_id=3,
            bbox=[1, 2, 10, 20],
            area=200,
            iscrowd=0,
            segmentation=[[1, 2, 11, 2, 11, 22]]) for i in (1, 2)
    ],
    categories=[dict(id=3, name='a')])
SECOND = {
    'images': ['images[1]', 'file_name 2.png'],
    'annotations': ['annotations[1]', 'image_id 2'],
    'categories': ['categories[0]']
}


def written(path, content=CONTENT):
    text = content if isinstance(content, str) else json.dumps(content)
    path.write_text(text)
    return path


def changed(section, **values):
    """The content with another last entry; a value of None takes it out."""
    content = copy.deepcopy(CONTENT)
    entry = content[section][-1]
    for key, value in values.items():
        if value is None:
            del entry[key]
        else:
            entry[key] = value
    return content


def build(path, kind='CocoDataset', **kwargs):
    init_default_scope('mmdet')
    return build_dataset(
        dict(
            type=kind,
            ann_file=str(path),
            data_prefix=dict(img='pictures/'),
            metainfo=dict(classes=('a', )),
            test_mode=True,
            pipeline=[],
            **kwargs))


def refused(call, path, *words):
    with pytest.raises(QuantError) as caught:
        call()
    line = str(caught.value)
    assert '\n' not in line
    for word in ['annotation file: ', str(path), *words]:
        assert word in line, line


NEEDED = [
    ('images', 'id'),
    ('images', 'file_name'),
    ('images', 'height'),
    ('images', 'width'),
    ('annotations', 'id'),
    ('annotations', 'image_id'),
    ('annotations', 'category_id'),
    ('annotations', 'bbox'),
    ('annotations', 'area'),
    ('categories', 'id'),
    ('categories', 'name'),
]


@pytest.mark.parametrize('section, key', NEEDED)
def test_what_a_data_set_lacks_is_named(section, key, tmp_path):
    path = written(tmp_path / 'ann.json', changed(section, **{key: None}))
    name = [word for word in SECOND[section] if not word.startswith(key)]
    refused(lambda: build(path), path, *name, f'no {key!r}')
    content = copy.deepcopy(CONTENT)
    for entry in content[section]:
        del entry[key]
    written(path, content)
    refused(lambda: build(path), path, f'{section}[0]', f'no {key!r}')


@pytest.mark.parametrize('section, values, words', [
    ('annotations', dict(bbox=[1, 2, 3]), ["'bbox' [1, 2, 3]", 'four']),
    ('annotations', dict(bbox=['1', '2', '3', '4']), ["'bbox' ['1'", 'four']),
    ('annotations', dict(bbox='1234'), ["'bbox' '1234'", 'four']),
    ('annotations', dict(area='large'), ["'area' 'large'", 'a number']),
    ('images', dict(height='forty'), ["'height' 'forty'", 'a number']),
    ('images', dict(file_name=3), ["'file_name' 3", 'a text']),
])  # yapf: disable
def test_a_value_of_another_form_is_named(section, values, words, tmp_path):
    path = written(tmp_path / 'ann.json', changed(section, **values))
    refused(lambda: build(path), path, *SECOND[section][:1], *words)


@pytest.mark.parametrize('content, words', [
    ('', ['is empty']),
    ('<html>', ['no JSON']),
    ('[1, 2]', ['list', 'images, annotations, categories']),
    ('3', ['int']),
    (dict(annotations=[], categories=[]), ["no 'images'"]),
    (dict(CONTENT, categories={'a': 3}), ["'categories' is a dict"]),
    (dict(CONTENT, annotations=[3]), ['annotations[0] is 3']),
    ({k: v for k, v in CONTENT.items() if k != 'categories'},
     ["no 'categories'"]),
])  # yapf: disable
def test_a_file_of_another_structure(content, words, tmp_path):
    path = written(tmp_path / 'ann.json', content)
    if content == dict(annotations=[], categories=[]):
        # No image is an empty data set, which its user speaks of.
        assert len(build(path)) == 0
        refused(lambda: read_annotations(path), path, *words)
    else:
        refused(lambda: build(path), path, *words)


@pytest.mark.parametrize('section, values', [
    ('annotations', dict(iscrowd=None)),
    ('annotations', dict(segmentation=None)),
    ('annotations', dict(image_id=77)),
    ('annotations', dict(category_id=77)),
    ('annotations', dict(area=0)),
])
def test_a_data_set_is_not_refused_for_what_mmdetection_copes_with(
        section, values, tmp_path):
    path = written(tmp_path / 'ann.json', changed(section, **values))
    assert len(build(path)) == 2
    assert len(build(written(path, dict(CONTENT, annotations=[])))) == 2


def test_an_entry_that_a_class_of_ones_own_cannot_read(tmp_path):
    base = DATASETS.get('mmdet.CocoDataset')

    class Picky(base):

        def parse_data_info(self, raw_data_info):
            if raw_data_info['raw_img_info']['id'] == 2:
                raise ZeroDivisionError('custom')
            return super().parse_data_info(raw_data_info)

    DATASETS.register_module('PickyOfAnnotations', module=Picky)
    path = written(tmp_path / 'ann.json')
    refused(lambda: build(path, 'PickyOfAnnotations'), path, "'id': 2",
            'ZeroDivisionError: custom')


def test_what_a_class_of_ones_own_needs_is_named(tmp_path):

    class Weighted(DATASETS.get('mmdet.CocoDataset')):

        def parse_data_info(self, raw_data_info):
            for entry in raw_data_info['raw_ann_info']:
                entry['weight'] + 1
            return super().parse_data_info(raw_data_info)

    DATASETS.register_module('WeightedOfAnnotations', module=Weighted)
    content = copy.deepcopy(CONTENT)
    content['annotations'][0]['weight'] = 1
    path = written(tmp_path / 'ann.json', content)
    refused(lambda: build(path, 'WeightedOfAnnotations'), path,
            'annotations[1]', "no 'weight'")


def test_wrong_arguments_of_a_data_set_are_told_as_such(tmp_path):
    path = written(tmp_path / 'ann.json')
    with pytest.raises(QuantError, match='CocoDataset: TypeError.*colour'):
        build(path, colour=3)


def metric(path, measures):
    return CocoMetric(ann_file=str(path), metric=measures)


@pytest.mark.parametrize('measures, section, values, words', [
    ('bbox', 'annotations', dict(area=None), ["no 'area'"]),
    ('bbox', 'annotations', dict(iscrowd=None), ["no 'iscrowd'"]),
    ('bbox', 'annotations', dict(bbox=None), ["no 'bbox'"]),
    ('bbox', 'annotations', dict(bbox=[1, 2, 3]), ["'bbox' [1, 2, 3]"]),
    ('bbox', 'annotations', dict(iscrowd='no'), ["'iscrowd' 'no'"]),
    (['bbox', 'segm'], 'annotations', dict(segmentation=None),
     ["no 'segmentation'"]),
    ('segm', 'annotations', dict(segmentation=[]), ["'segmentation' []"]),
    ('segm', 'images', dict(height=None), ["no 'height'"]),
])  # yapf: disable
def test_what_a_metric_lacks_is_named(measures, section, values, words,
                                      tmp_path):
    path = written(tmp_path / 'ann.json', changed(section, **values))
    refused(lambda: check_metric(metric(path, measures), path), path,
            *SECOND[section][:1], *words)


@pytest.mark.parametrize('section, values', [
    ('annotations', dict(segmentation=None)),
    ('images', dict(height=None)),
])
def test_boxes_alone_need_no_masks(section, values, tmp_path):
    path = written(tmp_path / 'ann.json', changed(section, **values))
    assert check_metric(metric(path, 'bbox'), path) == []


def test_objects_of_unknown_images_and_categories_are_told(tmp_path):
    values = dict(image_id=77, category_id=77, area=None)
    path = written(tmp_path / 'ann.json', changed('annotations', **values))
    images, categories = check_metric(metric(path, 'bbox'), path)
    assert '1 of 2' in images and 'images' in images and str(path) in images
    assert '1 of 2' in categories and 'categories' in categories


NAN = float('nan')
# Height and width of the images are 40 and 50.
MISREAD = [
    ('bbox', dict(id=0), ["'id' 0", 'from 1']),
    ('bbox', dict(id='x9'), ["'id' 'x9'", 'whole number']),
    ('bbox', dict(area=-1), ["'area' -1", '0 or more']),
    ('bbox', dict(area=10**400), ["'area' 1000"]),
    ('bbox', dict(bbox=[1, 2, -3, 4]), ["'bbox' [1, 2, -3, 4]", '0 or more']),
    ('bbox', dict(bbox=[NAN] * 4), ["'bbox' [nan"]),
    ('bbox', dict(bbox=[1e30] * 4), ["'bbox' [1e+30", '500 pixels']),
]
BAD_MASKS = {
    'nan later': ([[1, 2, 3, NAN, 5, 6]], '500 pixels'),
    'far': ([[0, 0, 1e9, 0, 1e9, 1e9]], '500 pixels'),
    'huge': ([[0, 0, 10**400, 0, 9, 9]], '500 pixels'),
    'flat': ([1., 2., 3., 4., 5., 6.], 'list of polygons'),
    'text': ([['a'] * 6], '500 pixels'),
    'none': ([None], 'list of polygons'),
    'word': ('zzz', 'polygons'),
    'code': (dict(size=[40, 50], counts='zzz'), 'counts'),
    'sum of code': (dict(size=[40, 50], counts='05S1'), '2000'),
    'sum': (dict(size=[40, 50], counts=[3, 4]), '2000'),
    'negative': (dict(size=[40, 50], counts=[-3, 2003]), '0 or more'),
    'no counts': (dict(size=[40, 50], counts=None), 'counts'),
    'no size': (dict(size=None, counts=[2000]), 'size'),
}
NOT_DRAWN = {
    'box': [[1, 2, 3, 4]],
    'odd': [[1, 2, 3, 4, 5, 6, 7]],
    'three': [[1, 2, 3]],
    'empty': [[]],
    'empty second': [[1, 2, 3, 4, 5, 6], []],
}


@pytest.mark.parametrize('measures, values, words', MISREAD)
def test_what_pycocotools_misreads_is_named(measures, values, words, tmp_path):
    path = written(tmp_path / 'ann.json', changed('annotations', **values))
    refused(lambda: check_metric(metric(path, measures), path), path,
            'annotations[1]', *words)


def check_masks(path, is_drawn):
    content = read_annotations(path)
    check_dataset(build(path), content, True, is_drawn)


@pytest.mark.parametrize('name', BAD_MASKS)
def test_masks_that_are_none_are_named(name, tmp_path):
    """By metrics of masks and by data sets whose masks are loaded."""
    mask, word = BAD_MASKS[name]
    path = written(tmp_path / 'ann.json',
                   changed('annotations', segmentation=mask))
    words = ['annotations[1]', "'segmentation' ", word]
    refused(lambda: check_metric(metric(path, 'segm'), path), path, *words)
    refused(lambda: check_masks(path, False), path, *words)
    assert check_metric(metric(path, 'bbox'), path) == []
    check_dataset(build(path), read_annotations(path), False, False)


@pytest.mark.parametrize('name', NOT_DRAWN)
def test_polygons_that_only_load_annotations_copes_with(name, tmp_path):
    path = written(tmp_path / 'ann.json',
                   changed('annotations', segmentation=NOT_DRAWN[name]))
    words = ['annotations[1]', "'segmentation' ", 'pairs of numbers']
    refused(lambda: check_metric(metric(path, 'segm'), path), path, *words)
    refused(lambda: check_masks(path, True), path, *words)
    check_masks(path, False)


@pytest.mark.parametrize('values', [
    dict(bbox=[-3, -2, 60, 45]),
    dict(bbox=[1, 2, 0, 0], area=0),
    dict(segmentation=[[-2, -1, 52, -1, 52, 41]]),
    dict(segmentation=[[1, 2, 3, 4, 5, 6], [1, 2, 3, 4]]),
    dict(segmentation=dict(size=[40, 50], counts=[10, 90, 1900]), iscrowd=1),
])  # yapf: disable
def test_annotations_as_coco_has_them_pass(values, tmp_path):
    path = written(tmp_path / 'ann.json', changed('annotations', **values))
    assert check_metric(metric(path, ['bbox', 'segm']), path) == []
    check_masks(path, True)


def test_ids_of_two_types_cannot_be_sorted(tmp_path):
    content = changed('images', id='two')
    del content['annotations'][1]
    path = written(tmp_path / 'ann.json', content)
    refused(lambda: check_metric(metric(path, 'bbox'), path), path,
            'images[1]', "'two'")


def test_run_lengths_are_those_of_pycocotools():
    random = np.random.default_rng(0)
    for share in (0., .01, .5, .99, 1.):
        mask = random.random((70, 90)) < share
        code = coco_mask.encode(np.asfortranarray(mask.astype(np.uint8)))
        runs = run_lengths(code['counts'].decode())
        filled = np.repeat(np.arange(len(runs)) % 2, runs)
        assert (filled.reshape(90, 70).T == mask).all()
