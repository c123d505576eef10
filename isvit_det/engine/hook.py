"""SOSCalibrationHook: calibrates a model once its weights are loaded."""
import contextlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional

from mmengine.dist import is_main_process
from mmengine.hooks import Hook
from mmengine.model import BaseTTAModel, is_model_wrapper
from mmengine.runner import Runner

from isvit_det.calibration.events import UnitRecord
from isvit_det.calibration.store import ActivationPool
from isvit_det.checkpoint import is_packed, save_packed
from isvit_det.core.digests import checksum
from isvit_det.core.errors import QuantError
from isvit_det.core.layers import is_calibrated
from isvit_det.core.plain import plain
from isvit_det.core.settings import SOSConfig
from isvit_det.engine.calibrate import WORKSPACE, calibrate_detector_
from isvit_det.engine.heads import find_products
from isvit_det.engine.images import CalibrationImages, calibration_images
from isvit_det.engine.tested_weights import take_tested_weights_
from isvit_det.evaluation.tasks import metainfo
from isvit_det.inputs.datasets import (dataset_of, evaluation_paths,
                                       refuse_overlap)
from isvit_det.packed.header import check_others
from isvit_det.registry import HOOKS
from isvit_det.report.provenance import describe_origin, fingerprint
from isvit_det.report.tables import count_calls, list_sites_run


@dataclass
class Outcome:
    """What a calibration did.

    Attributes:
        records: one of each unit.
        packed: the file written.
        provenance: what the file says of its making.
    """
    records: List[UnitRecord]
    packed: Path
    provenance: Dict[str, Any]


@HOOKS.register_module()
class SOSCalibrationHook(Hook):
    """Calibrate in ``before_test``, and write the packed checkpoint there.

    A model that is calibrated already is left alone, so a packed file can be
    tested with the config it was made from. What is calibrated are the
    weights that the test would evaluate: other hooks that exchange them
    (EMA) do so once before it, and are left out from then on.

    Args:
        sos: values of ``SOSConfig``.
        calib_dataloader: data loader config of which the data set is used;
            None draws from the training split with the test pipeline.
        out: name of the packed file in the work directory.
        store_gb: memory for activations in GB (1e9 bytes); None takes half
            of what is available.

    Attributes:
        outcome: None until a calibration has ended.
        teacher: a copy of the float backbone that calibration compares
            with and leaves as it is; None has it make its own.
        left_out: class names of the hooks that are left out.
    """
    priority = 'VERY_LOW'

    def __init__(self,
                 sos: Optional[Mapping[str, Any]] = None,
                 calib_dataloader: Optional[Mapping[str, Any]] = None,
                 out: str = 'packed.pth',
                 store_gb: Optional[float] = None) -> None:
        self.sos_values = dict(sos or {})
        self.calib_dataloader = calib_dataloader
        self.out = out
        self.store_gb = store_gb
        self.outcome: Optional[Outcome] = None
        self.teacher: Any = None
        self.left_out: List[str] = []
        self._weights: Optional[str] = None
        self._postponed = False
        self._calls: Dict[str, int] = {}
        self._images: Optional[CalibrationImages] = None
        self._image_hashes: List[str] = []

    @contextlib.contextmanager
    def postponed(self) -> Iterator[None]:
        """Let a test run without calibration: the float evaluation."""
        self._postponed = True
        try:
            yield
        finally:
            self._postponed = False

    def before_run(self, runner: Runner) -> None:
        """Check the settings before any work is done.

        Raises:
            QuantError: if one is wrong, or several hooks calibrate.
        """
        ours = [
            hook for hook in runner.hooks
            if isinstance(hook, SOSCalibrationHook)
        ]
        if len(ours) > 1:
            names = [type(hook).__name__ for hook in ours]
            raise QuantError(f'custom_hooks: {len(ours)} hooks calibrate, '
                             f'{names}; keep one.')
        name = Path(str(self.out))
        if name.name != str(self.out) or name.suffix != '.pth':
            raise QuantError(f'SOSCalibrationHook: out={self.out!r}; give the '
                             'name of a .pth file, without a folder: it lies '
                             'in the work directory.')
        self.sos_config(runner)
        # Refuses a wrong budget.
        ActivationPool(Path(runner.work_dir), self.store_gb)

    def after_load_checkpoint(self, runner: Runner,
                              checkpoint: Dict[str, Any]) -> None:
        """Check what lies beside a packed state, which no model sees.

        Raises:
            QuantError: if it is not what the calibration wrote.
        """
        if is_packed(checkpoint):
            check_others(checkpoint)

    def sos_config(self, runner: Runner) -> SOSConfig:
        """Settings of the run, on top of the method's.

        Raises:
            QuantError: if the model is none of ours, or a setting is wrong.
        """
        quant = getattr(bare_model(runner), 'quant_config', None)
        if quant is None:
            raise QuantError(
                'SOSCalibrationHook: model.type is not '
                "'isvit_det.quantized_detector'; build the detector with it.")
        return SOSConfig.from_dict(self.sos_values, quant)

    def settle(self, runner: Runner, is_begun: bool = False) -> None:
        """Decide which weights are meant, before anything is run.

        Args:
            runner: its float weights are loaded.
            is_begun: whether its test has come to this hook.
        """
        if self._weights is None:
            self.left_out = take_tested_weights_(runner, self, is_begun)
            self._note_weights(runner)

    def _note_weights(self, runner: Runner) -> None:
        self._weights = checksum(bare_model(runner).state_dict())

    def _check_weights(self, runner: Runner) -> None:
        """Raise if the weights are not those that were noted last."""
        if self._weights is None:
            return
        if checksum(bare_model(runner).state_dict()) != self._weights:
            kinds = [hook['type'] for hook in runner.cfg['custom_hooks']]
            names = [getattr(kind, '__name__', kind) for kind in kinds]
            raise QuantError(
                f'custom_hooks: one of {names} changes the weights during a '
                'test, whose AP would be of other weights than those that '
                'are calibrated; take it out.')

    def prepare(self, runner: Runner) -> CalibrationImages:
        """Draw the calibration images and check what can be checked.

        None may be evaluated, and the model must predict on the first.
        """
        if self._images is None:
            source = runner.cfg.get('load_from')
            packed = self.packed(runner)
            if source and packed.exists() and packed.samefile(source):
                raise QuantError(f'--work-dir: {packed} is the float '
                                 'checkpoint itself, which the packed one '
                                 'would replace; give another folder.')
            sos = self.sos_config(runner)
            loader = self.calib_dataloader
            images = calibration_images(
                runner.cfg, None if loader is None else dataset_of(
                    loader, 'calib_dataloader'), sos.num_images, sos.seed)
            dataset = runner.test_loop.dataloader.dataset
            self._image_hashes = refuse_overlap(images.paths(),
                                                evaluation_paths(dataset))
            images.check(bare_model(runner))
            if len(images) < images.asked:
                runner.logger.warning(
                    f'{images.asked} calibration images asked for, there are '
                    f'{len(images)}: all are used')
            model = bare_model(runner)
            model.products = find_products(model, images)
            self._images = images
        return self._images

    def packed(self, runner: Runner) -> Path:
        """The packed file, written or to be written."""
        return Path(runner.work_dir) / self.out

    def before_test(self, runner: Runner) -> None:
        """Calibrate, unless that has been done.

        Raises:
            QuantError: if the model is wrapped for test-time augmentation.
        """
        model = bare_model(runner)
        # This runs in training mode; DropPath would corrupt the targets.
        model.eval()
        if self._postponed or is_calibrated(model):
            return
        if isinstance(runner.model, BaseTTAModel):
            raise QuantError('SOSCalibrationHook: a model is not calibrated '
                             'with --tta; calibrate it without, and give the '
                             'packed file to --tta.')
        self.settle(runner, is_begun=True)
        model = bare_model(runner)
        model.eval()
        images = self.prepare(runner)
        sos = self.sos_config(runner)
        origin = plain(
            describe_origin(model, runner.cfg.get('load_from'), images, sos))
        key = fingerprint(origin, self._image_hashes, [
            runner.cfg.model, runner.cfg.test_dataloader['dataset'],
            self.calib_dataloader
        ], model)
        records = calibrate_detector_(model, images, sos,
                                      Path(runner.work_dir) / WORKSPACE, key,
                                      runner.logger, self.store_gb,
                                      self.teacher)
        if model.float_layers:
            # MMDetection's tools find the config beside the packed file.
            runner.cfg.model['float_layers'] = model.float_layers
            runner.dump_config()
        packed = self.packed(runner)
        if is_main_process():
            save_packed(model, packed, origin,
                        metainfo(runner.test_loop.dataloader.dataset))
            runner.logger.info(f'packed checkpoint: {packed}')
        self.outcome = Outcome(records, packed, origin)
        self._note_weights(runner)

    def before_test_epoch(self, runner: Runner) -> None:
        """Note how often every site has run."""
        self._calls = count_calls(bare_model(runner))

    def before_test_iter(self,
                         runner: Runner,
                         batch_idx: int,
                         data_batch: Any = None) -> None:
        """Check before the first image that the weights are as calibrated.

        Raises:
            QuantError: if another hook has changed them.
        """
        if batch_idx == 0:
            self._check_weights(runner)

    def after_test_iter(self,
                        runner: Runner,
                        batch_idx: int,
                        data_batch: Any = None,
                        outputs: Any = None) -> None:
        """Check on the first image that the backbone ran quantized.

        Raises:
            QuantError: naming sites of the backbone that did not, or if a
                hook has changed the weights.
        """
        model = bare_model(runner)
        if batch_idx != 0:
            return
        self._check_weights(runner)
        if not self._postponed and is_calibrated(model):
            list_sites_run(model, self._calls)

    def after_test_epoch(self,
                         runner: Runner,
                         metrics: Optional[Dict[str, float]] = None) -> None:
        """Check that the weights are still those of the first image.

        Raises:
            QuantError: if a hook has changed them.
        """
        self._check_weights(runner)


def bare_model(runner: Runner) -> Any:
    """The runner's model without wrappers (distributed, test time)."""
    model = runner.model
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = model.module
    return model
