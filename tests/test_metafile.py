"""The metafile and the model index: true to the configs and to the paper."""
import re
from pathlib import Path

import mmdet
import pytest
from mmengine.fileio import load

from isvit_det.inputs.configs import load_config

REPO = Path(__file__).parents[1]
META = load(str(REPO / 'configs/isvit/metafile.yml'))
MODELS = {model['Name']: model for model in META['Models']}
CONFIGS = sorted((REPO / 'configs/isvit').glob('*.py'))
W4A4 = [path for path in CONFIGS if '_isvit-w4a4_' in path.name]
MMDET = Path(mmdet.__path__[0]) / '.mim'
TASKS = {'box AP': 'Object Detection', 'mask AP': 'Instance Segmentation'}
# The paper's COCO table at 4 bits: box and mask AP, then those in float.
PUBLISHED = {
    'mask-rcnn_swin-t': (37.5, 36.6, 46.0, 41.6),
    'mask-rcnn_swin-s': (43.4, 40.3, 48.5, 43.3),
    'cascade-mask-rcnn_swin-t': (48.2, 42.0, 50.4, 43.7),
    'cascade-mask-rcnn_swin-s': (50.3, 43.6, 51.9, 45.0)
}


def facts(path):
    return MODELS[path.stem]['Metadata']


def test_the_index_names_the_metafile():
    index = load(str(REPO / 'model-index.yml'))
    assert index == {'Import': ['configs/isvit/metafile.yml']}


def test_every_config_has_one_entry_and_every_entry_a_config():
    assert len(MODELS) == len(META['Models'])
    assert sorted(MODELS) == [path.stem for path in CONFIGS]
    for name, model in MODELS.items():
        assert model['Config'] == f'configs/isvit/{name}.py'
        assert model['In Collection'] == 'I&S-ViT'


def test_the_collection_is_the_paper():
    collection, = META['Collections']
    assert collection['Name'] == 'I&S-ViT'
    assert collection['Paper']['URL'] == 'https://arxiv.org/abs/2311.10126'
    assert collection['Paper']['Title'].startswith('I&S-ViT: An Inclusive')
    assert (REPO / collection['README']).is_file()


@pytest.mark.parametrize('path', W4A4, ids=lambda path: path.stem)
def test_the_metadata_are_the_configs(path):
    found, cfg = facts(path), load_config(str(path), None)
    quant = cfg.model.quant
    assert (found['Bits'], found['Scope'],
            found['Method']) == (quant.bits, quant.scope, quant.method)
    hook, = cfg.custom_hooks
    images = META['Collections'][0]['Metadata']['Calibration Images']
    assert hook.sos.num_images == images
    base = found['Float Config']
    if not base.startswith('mmdet::'):
        assert (REPO / base).is_file()
        base = f'../{Path(base).parent.name}/{Path(base).name}'
    assert re.search(r"'(.+?)'", path.read_text())[1] == base


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_other_bits_change_nothing_else(path):
    found = facts(path)
    bits = found['Bits']
    assert f"bits='{bits}'" in path.read_text()
    assert f'_isvit-{bits}_' in path.name
    sibling = path.with_name(path.name.replace(bits, 'w4a4'))
    assert dict(found, Bits='w4a4') == facts(sibling)


def test_a_name_and_bits_choose_one_config():
    keys = {(one['Metadata']['Detector'], one['Metadata']['Bits'])
            for one in META['Models']}
    assert len(keys) == len(CONFIGS) == 4 * len(W4A4)
    for path in CONFIGS:
        detector, arch = facts(path)['Detector'].split('_')
        assert path.name.startswith(f'{detector}_{arch}-p')


def test_float_checkpoints_are_where_their_owners_say():
    zoo = {
        f'mmdet::swin/{model["Name"]}.py': model['Weights']
        for model in load(str(MMDET / 'configs/swin/metafile.yml'))['Models']
    }
    converted = {
        'tools/convert_swin_od.py':
        'https://github.com/SwinTransformer/storage/',
        'tools/convert_vitdet.py':
        'https://dl.fbaipublicfiles.com/detectron2/ViTDet/COCO/'
    }
    for path in W4A4:
        found = facts(path)
        address = found.get('Float Checkpoint')
        converter = found.get('Float Converter')
        if found['Float Config'] in zoo:
            assert address == zoo[found['Float Config']] and not converter
        elif '_deit-' in path.name:
            assert address is converter is None
        else:
            assert (REPO / converter).is_file()
            assert address.startswith(converted[converter])


@pytest.mark.parametrize('path', CONFIGS, ids=lambda path: path.stem)
def test_results_are_the_papers_or_not_measured(path):
    results = MODELS[path.stem]['Results']
    expected = None
    if path in W4A4:
        expected = PUBLISHED.get(facts(path)['Detector'])
    assert len(results) == len(TASKS)
    for index, (kind, task) in enumerate(TASKS.items()):
        metrics = {kind: 'not measured'}
        if expected is not None:
            metrics[f'Published (I&S-ViT) {kind}'] = expected[index]
            metrics[f'Published (I&S-ViT) float {kind}'] = expected[index + 2]
        assert results[index] == dict(
            Task=task, Dataset='COCO', Metrics=metrics)
