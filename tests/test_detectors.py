"""Every detector of MMDetection with a Swin backbone, in both scopes."""
import importlib.util
import json
from pathlib import Path

import mmdet
import pytest
import torch
from mmdet.apis import inference_detector, init_detector
from mmdet.datasets import CocoDataset
from mmdet.models.layers.transformer.grounding_dino_layers import \
    GroundingDinoTransformerDecoder
from mmdet.models.layers.transformer.utils import MLP

from benchmarks.detectors import HEADER, Trials, draw_images, table
from benchmarks.small import swin_configs, write_language_model
from isvit_det.apis import quantize_detector
from isvit_det.commands.quantize_det import main
from isvit_det.core.errors import QuantError
from isvit_det.engine.images import calibration_images
from isvit_det.inputs.configs import load_config
from tests.engine.shrunk import FEW_BOXES, SWIN, Source, draw_coco, make_shrunk
from tests.marks import slow

DOCS = Path(__file__).parents[1] / 'docs/detectors.md'
has_transformers = importlib.util.find_spec('transformers') is not None
needs_transformers = pytest.mark.skipif(
    not has_transformers, reason='the package transformers is not installed')
VIDEO = ('mask2former_vis/'
         'mask2former_swin-l-p4-w12-384-in21k_8xb2-8e_youtubevis2021')
# Detectors of each kind that are quick, and the scopes they are tried in.
FEW = (
    ('dyhead/atss_swin-l-p4-w12_fpn_dyhead_ms-2x_coco', 'detector'),
    ('mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco-panoptic',
     'detector'),
    ('rtmdet/rtmdet_l_swin_b_p6_4xb16-100e_coco', 'backbone'),
    ('v3det/dino-4scale_swin_16xb1_sample1e-3_v3det_36e', 'detector'),
)
READING = (
    'glip/glip_atss_swin-t_a_fpn_dyhead_pretrain_obj365',
    'grounding_dino/lvis/grounding_dino_swin-t_pretrain_zeroshot_lvis',
    'mm_grounding_dino/grounding_dino_swin-t_pretrain_obj365',
)


@pytest.fixture(scope='module', autouse=True)
def offline():
    """Nothing is downloaded."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv('HF_HUB_OFFLINE', '1')
        yield


@pytest.fixture(scope='module')
def trials(tmp_path_factory):
    words = tmp_path_factory.mktemp('words')
    if has_transformers:
        write_language_model(str(words))
    return Trials(str(words))


def read(name):
    return load_config(f'mmdet::{name}.py', None)


@pytest.fixture
def fitting_decoder(monkeypatch):
    """Grounding DINO's decoder of as many inputs as its encodings have.

    Some releases of MMDetection have half of them, and cannot predict.
    """
    make = GroundingDinoTransformerDecoder._init_layers

    def fit(self):
        make(self)
        coordinates = 4 if _encodes_wide() else 2
        self.ref_point_head = MLP(self.embed_dims * coordinates,
                                  self.embed_dims, self.embed_dims, 2)

    monkeypatch.setattr(GroundingDinoTransformerDecoder, '_init_layers', fit)


def _encodes_wide():
    parent = GroundingDinoTransformerDecoder.__mro__[1]
    text = Path(importlib.util.find_spec(parent.__module__).origin).read_text()
    return 'num_feats=query.shape[2]' in text


@pytest.mark.parametrize('name, scope', FEW)
def test_a_detector_predicts_the_same_when_loaded(trials, name, scope):
    trial = trials.of(read(name), scope)
    assert trial.refusal == '' and trial.same and trial.num_detections > 0


@needs_transformers
@pytest.mark.parametrize('name', [READING[0], *map(slow, READING[1:])])
def test_a_detector_that_reads_text_is_quantized_around_its_language_model(
        trials, fitting_decoder, name):
    trial = trials.of(read(name), 'detector')
    assert trial.refusal == '' and trial.same and trial.num_detections > 0
    assert trial.in_float['BertModel'] == 1


def glip(words):
    """Options that make a GLIP small."""
    wide = [32, 64, 128]
    return Source(
        'mmdet::glip/'
        'glip_atss_swin-t_a_fpn_dyhead_16xb2_ms-2x_funtune_coco.py', {
            **SWIN,
            **FEW_BOXES, 'model.neck.in_channels': wide,
            'model.language_model.name': words,
            'model.bbox_head.lang_model_name': words,
            'model.bbox_head.num_dyhead_blocks': 1
        })


@pytest.fixture(scope='module')
def reader(tmp_path_factory):
    """A GLIP on drawn pictures, whose prompt is the names of COCO."""
    folder = tmp_path_factory.mktemp('glip')
    names = ' '.join(CocoDataset.METAINFO['classes']).split()
    write_language_model(str(folder / 'words'), sorted(set(names)))
    data = draw_coco(folder / 'data')
    return make_shrunk(glip(str(folder / 'words')), data, folder)


@needs_transformers
def test_a_run_takes_the_prompt_from_its_data_sets(reader, tmp_path):
    assert main([
        *reader.words(), '--scope', 'detector', '--work-dir',
        str(tmp_path), '--method', 'minmax', '--calib-images', '2'
    ]) == 0
    result = json.loads((tmp_path / 'result.json').read_text())
    assert 0 < result['quantized']['box_ap'] < result['float']['box_ap']
    kept = {m['name']: m['type'] for m in result['float_modules']}
    assert kept['language_model'] == 'BertModel'
    assert not any(name.startswith('language_model.') for name in kept)
    assert 'language model' in result['float_layers']['language_model']
    config = tmp_path / reader.name.split('/')[-1]
    model = init_detector(
        str(config), str(tmp_path / 'packed.pth'), device='cpu')
    picture = draw_images()[0]
    found = inference_detector(
        model, picture, text_prompt='dog. cat.', custom_entities=True)
    assert len(found.pred_instances) > 0


@needs_transformers
def test_a_prompt_is_needed_and_is_part_of_what_the_codes_depend_on(
        reader, tmp_path):
    model = init_detector(
        load_config(reader.name, {**reader.options}),
        reader.checkpoint,
        device='cpu')
    with pytest.raises(QuantError, match='text_prompt: a GLIP looks for'):
        quantize_detector(model, draw_images())
    one, other = (
        quantize_detector(
            model,
            draw_images(),
            scope='detector',
            method='minmax',
            text_prompt=prompt,
            custom_entities=True) for prompt in ('dog. cat.', 'bus. train.'))
    assert one.provenance['prompt'] == dict(
        text='dog. cat.', custom_entities=True)
    states = one.state_dict(), other.state_dict()
    differing = [
        key for key in states[0]
        if not torch.equal(states[0][key], states[1][key])
    ]
    assert differing and not any(
        key.startswith('backbone.') for key in differing)


def test_a_data_set_without_a_prompt_is_refused():
    cfg = read('mm_grounding_dino/grounding_dino_swin-t_pretrain_obj365')
    with pytest.raises(QuantError, match='ODVGDataset brings no prompt'):
        calibration_images(cfg, None, 2, 0)


def test_a_detector_of_videos_is_refused(trials):
    trial = trials.of(read(VIDEO), 'detector')
    assert 'Mask2FormerVideo' in trial.refusal and 'videos' in trial.refusal


@needs_transformers
@pytest.mark.slow
def test_the_table_of_all_is_as_it_says(trials):
    configs = swin_configs()
    assert len(configs) >= 80
    found = table(trials, configs)
    assert 'predicts something else' not in found
    if f'(here mmdet {mmdet.__version__})' not in DOCS.read_text():
        pytest.skip('docs/detectors.md is of another MMDetection')
    assert DOCS.read_text() == f'{HEADER}\n\n{found}\n'
