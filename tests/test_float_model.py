"""Whoever hands in a float model finds it bit for bit as it was."""
import copy
import shutil

import pytest
import timm
import torch
from mmdet.registry import MODELS
from mmengine.config import Config
from mmengine.registry import init_default_scope
from timm.data import create_transform, resolve_model_data_config

from benchmarks.restart import calibrate_by_restart
from isvit_det.apis import quantize_detector
from isvit_det.calibration import sos as sos_module
from isvit_det.calibration.sos import calibrate
from isvit_det.classifiers.images import ImageList, class_labels, find_images
from isvit_det.classifiers.run import ClassifierRun
from isvit_det.classifiers.swin import quantize_swin
from isvit_det.classifiers.vit import quantize_vit
from isvit_det.commands.quantize_det import main
from isvit_det.core.settings import QuantConfig, SOSConfig
from isvit_det.datasets.drawn import generate
from isvit_det.engine import run as run_module
from isvit_det.runtime.engine import attach_runtime_
from tests.engine.classifiers import CLASSES, NAMES, make_weights
from tests.engine.tiny import FLOAT_DEIT, make_tiny

# All that changes parameters: ranges, both learned stages, rotations.
QUANT = dict(bits='w3a3', method='isvit', percentiles=(.99, ))
SOS = dict(iters=1, num_images=2)


class Snapshot:
    """All of a model that a calibration may not touch."""

    def __init__(self, model):
        tensors = [*model.named_parameters(), *model.named_buffers()]
        self.values = {key: value.detach().clone() for key, value in tensors}
        self.learned = {key: value.requires_grad for key, value in tensors}
        self.grads = {key: value.grad is None for key, value in tensors}
        self.modes = {key: m.training for key, m in model.named_modules()}

    def check(self, model):
        now = Snapshot(model)
        assert now.values.keys() == self.values.keys()
        for key, value in self.values.items():
            assert torch.equal(now.values[key], value), key
        assert now.learned == self.learned and now.grads == self.grads
        assert now.modes == self.modes


def storages(model):
    tensors = [*model.parameters(), *model.buffers()]
    return {
        tensor.untyped_storage().data_ptr()
        for tensor in tensors if tensor.numel()
    }


def check_apart(source, quantized):
    assert not storages(source) & storages(quantized)
    assert not set(source.modules()) & set(quantized.modules())


@pytest.fixture(scope='module')
def pictures(tmp_path_factory):
    """Folders: train, and val with a folder for each class."""
    folder = tmp_path_factory.mktemp('pictures') / 'data'
    generate(folder, dict(train=6, val=6))
    for index, path in enumerate(sorted((folder / 'val').iterdir())):
        place = folder / f'classes/class{index % CLASSES}'
        place.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, place)
    return folder


@pytest.mark.parametrize('name', NAMES)
def test_a_run_reports_what_an_untouched_model_gives(name, pictures, tmp_path):
    make_weights(name, tmp_path / 'w.pth')
    run = ClassifierRun(name, str(tmp_path / 'w.pth'), pictures / 'train',
                        pictures / 'classes', QUANT, SOS, tmp_path / 'work')
    before = Snapshot(run.source)
    check_apart(run.source, run.model)
    scores = run.run()['scores']
    before.check(run.source)
    check_apart(run.source, run.model)
    assert scores == measure(name, tmp_path, pictures / 'classes')


@torch.no_grad()
def measure(name, folder, val):
    """Scores of models that are built from the files alone."""
    source = timm.create_model(name, num_classes=CLASSES).eval()
    content = torch.load(folder / 'w.pth', weights_only=True)
    source.load_state_dict(content['model'])
    other = timm.create_model(name, num_classes=CLASSES).eval()
    build = quantize_swin if 'swin' in name else quantize_vit
    packed = torch.load(folder / 'work/packed.pth', weights_only=True)
    quantized = build(other, QuantConfig.from_dict(packed['quant'])).eval()
    quantized.load_state_dict(packed['state_dict'])
    attach_runtime_(quantized)
    transform = create_transform(**resolve_model_data_config(source))
    paths = find_images(val, '--val')
    labels = torch.tensor(class_labels(val, paths)[1])
    images = torch.stack([image for image, _ in ImageList(paths, transform)])
    expected, found = source(images), quantized(images)
    assert not torch.equal(expected, found)
    log_p, log_q = (x.double().log_softmax(1) for x in (expected, found))
    num = len(images)
    scores = dict(
        images=num,
        agreement=(expected.argmax(1) == found.argmax(1)).sum().item() / num,
        kl=(log_p.exp() * (log_p - log_q)).sum().item() / num)
    for kind, logits in (('float', expected), ('quantized', found)):
        for k in (1, 5):
            best = logits.topk(min(k, CLASSES)).indices
            hits = (best == labels[:, None]).any(1).sum().item()
            scores[f'{kind}_top{k}'] = hits / num
    return scores


@pytest.mark.parametrize('name', NAMES)
def test_a_classifier_in_use_stays_as_it_is(name, tmp_path):
    """In training mode, part of it frozen or in another mode."""
    source = make_weights(name, tmp_path / 'w.pth').train()
    source.patch_embed.requires_grad_(False)
    source.norm.requires_grad_(False).eval()
    before = Snapshot(source)
    build = quantize_swin if 'swin' in name else quantize_vit
    config = QuantConfig.from_dict(QUANT)
    quantized = build(source, config).eval()
    settings = {**SOS, 'mirror_images': False}
    calibrate(quantized, list(torch.randn(2, 1, 3, 32, 32)), config,
              SOSConfig.from_dict(settings, config, 'classifier'), tmp_path,
              'x')
    before.check(source)
    check_apart(source, quantized)


def swin(cfg):
    pass


def windowed(cfg):
    """ViT with windows and relative positions, as ViTDet has it."""
    cfg.model.backbone.update(
        type='isvit_det.VisionTransformer',
        window_size=4,
        global_blocks=[1],
        rel_pos_size=14)


def plain(cfg):
    """ViT with global attention throughout."""
    cfg.model.backbone.update(
        type='isvit_det.VisionTransformer', window_size=0, global_blocks=[])


def deit(cfg):
    """DeiT with its class token."""
    cfg.model.backbone.update(
        window_size=0, global_blocks=[], num_prefix_tokens=1)


@pytest.fixture(scope='module')
def tinies(tmp_path_factory):
    return dict(
        swin=make_tiny(tmp_path_factory.mktemp('swin')),
        deit=make_tiny(
            tmp_path_factory.mktemp('deit'), float_config=FLOAT_DEIT))


def build_float(tiny, change):
    """As init_detector leaves a model, with random weights."""
    cfg = Config.fromfile(tiny.config)
    change(cfg)
    cfg.model.backbone.init_cfg = None
    init_default_scope('mmdet')
    torch.manual_seed(0)
    model = MODELS.build(copy.deepcopy(cfg.model))
    model.init_weights()
    model.cfg, model.dataset_meta = cfg, dict(classes=('a', 'b'))
    return model.eval()


@pytest.mark.parametrize('family, change, scope, in_use', [
    ('swin', swin, 'detector', False),
    ('swin', swin, 'backbone', True),
    ('deit', windowed, 'detector', True),
    ('deit', plain, 'backbone', False),
    ('deit', deit, 'detector', False),
    ('deit', deit, 'backbone', True),
])
def test_a_detector_stays_as_it_is(family, change, scope, in_use, tinies):
    tiny = tinies[family]
    model = build_float(tiny, change)
    if in_use:
        model.train()
        model.rpn_head.eval()
        model.backbone.requires_grad_(False)
        next(model.neck.parameters()).requires_grad_(False)
    before, meta = Snapshot(model), copy.deepcopy(model.dataset_meta)
    config = copy.deepcopy(model.cfg.to_dict())
    paths = sorted((tiny.data / 'train').iterdir())[:2]
    quantized = quantize_detector(
        model, paths, bits='w3a3', scope=scope, iters=1)
    before.check(model)
    check_apart(model, quantized)
    assert model.cfg.to_dict() == config and model.dataset_meta == meta


@pytest.mark.parametrize('family', ['swin', 'deit'])
def test_what_a_run_compares_with_is_the_files_backbone(
        family, tinies, tmp_path, monkeypatch):
    tiny, copies, seen = tinies[family], [], []
    copy_of, error_of = copy.deepcopy, run_module.backbone_error

    def deepcopy(value, *args):
        if hasattr(value, 'units'):
            copies.append(value)
        return copy_of(value, *args)

    def backbone_error(model, teacher, *more):
        seen.append((model.backbone, teacher))
        return error_of(model, teacher, *more)

    for module in (run_module, sos_module):
        monkeypatch.setattr(module.copy, 'deepcopy', deepcopy)
    monkeypatch.setattr(run_module, 'backbone_error', backbone_error)
    assert main([
        tiny.config, tiny.checkpoint, '--bits', 'w3a3', '--iters', '1',
        '--calib-images', '2', '--no-float-eval', '--work-dir',
        str(tmp_path)
    ]) == 0
    (student, teacher), = seen
    # Calibration compares with the same one: a second copy costs memory.
    assert len(copies) == 1
    expected = torch.load(tiny.checkpoint, weights_only=True)['state_dict']
    found = teacher.state_dict()
    for key, value in expected.items():
        if key.startswith('backbone.'):
            assert torch.equal(found[key[len('backbone.'):]], value), key
    assert not any(value.any()
                   for key, value in found.items() if key.endswith('fitted'))
    assert not any(module.training for module in teacher.modules())
    check_apart(teacher, student)


@pytest.mark.parametrize('given', [False, True])
def test_what_calibration_compares_with_stays_as_it_is(given, tmp_path,
                                                       monkeypatch):
    source = make_weights('vit_small_drawn_32', tmp_path / 'w.pth')
    config = QuantConfig.from_dict(QUANT)
    student = quantize_vit(source, config).eval()
    before = Snapshot(student)
    teachers = [copy.deepcopy(student)] if given else []
    copy_of = copy.deepcopy

    def deepcopy(value, *args):
        made = copy_of(value, *args)
        if value is student:
            teachers.append(made)
        return made

    monkeypatch.setattr(sos_module.copy, 'deepcopy', deepcopy)
    calibrate(
        student,
        list(torch.randn(2, 1, 3, 32, 32)),
        config,
        SOSConfig.from_dict(SOS, config),
        tmp_path,
        'x',
        teacher=teachers[0] if given else None)
    teacher, = teachers
    before.check(teacher)
    check_apart(teacher, student)


def test_the_benchmarks_reference_leaves_its_teacher(tmp_path):
    source = make_weights('swin_drawn_32', tmp_path / 'w.pth')
    config = QuantConfig.from_dict(dict(QUANT, method='isvit_paper'))
    student = quantize_swin(source, config).eval().backbone
    teacher = copy.deepcopy(student)
    before = Snapshot(teacher)
    calibrate_by_restart(student, teacher, list(torch.randn(2, 1, 3, 32, 32)),
                         config,
                         SOSConfig.from_dict(dict(SOS, items='image'), config))
    before.check(teacher)
    check_apart(teacher, student)
