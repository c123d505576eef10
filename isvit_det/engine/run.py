"""A run: float evaluation, calibration, quantized evaluation, report."""
import contextlib
import copy
import shutil
import time
from pathlib import Path
from typing import (Any, Callable, Dict, Iterator, List, Mapping, Optional,
                    Sequence)

from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.dist import is_main_process
from mmengine.logging import MMLogger
from mmengine.runner import Runner, ValLoop
from mmengine.runner.checkpoint import load_state_dict

from isvit_det.checkpoint import read_checkpoint
from isvit_det.core.distributed import all_gather
from isvit_det.core.errors import QuantError
from isvit_det.core.files import check_writable
from isvit_det.core.layers import is_calibrated
from isvit_det.core.settings import QuantConfig
from isvit_det.detector import float_modules
from isvit_det.engine.calibrate import WORKSPACE
from isvit_det.engine.float_metrics import (FloatMetrics, prediction_key,
                                            sources_of)
from isvit_det.engine.hook import SOSCalibrationHook, bare_model
from isvit_det.engine.layer_statistics import keep_statistics, spread
from isvit_det.engine.reported import REPORT
from isvit_det.evaluation.agreement import plan_evaluation
from isvit_det.evaluation.data_checks import check_test_data, test_data_errors
from isvit_det.evaluation.figures import explain_gaps
from isvit_det.evaluation.ground_truth import read_truth
from isvit_det.evaluation.loop import PREDICTIONS, Evaluation
from isvit_det.evaluation.predictions import PredictionFile
from isvit_det.evaluation.stopwatch import Stopwatch
from isvit_det.evaluation.tasks import describe_truth
from isvit_det.evaluation.trial import try_log, try_metrics
from isvit_det.inputs.configs import config_errors
from isvit_det.inputs.data_errors import TestWatch, read
from isvit_det.inputs.hooks import hook_errors
from isvit_det.page.write import write_page_or_warn
from isvit_det.report.layer_file import LAYERS, LAYERS_PACKED
from isvit_det.report.tables import (ERROR_IMAGES, backbone_error, count_calls,
                                     list_sites_run, peak_memory, sum_calls,
                                     weight_bytes, write_result)
from isvit_det.runtime.engine import describe_engine
from isvit_det.screen.output import watch
from isvit_det.screen.progress import track

FORMAT_VERSION = 1


class _WatchedRunner(Runner):
    """A runner whose log is also shown on the open screen, in part."""

    def build_logger(self, *args: Any, **kwargs: Any) -> MMLogger:
        logger = super().build_logger(*args, **kwargs)
        watch(logger)
        return logger


class QuantizationRun:
    """Evaluates a float model, calibrates it, and evaluates it quantized.

    A packed model is only evaluated. The constructor checks all input, before
    the first evaluation.

    Args:
        cfg: a quantized config with a ``SOSCalibrationHook``, ``work_dir``
            and ``load_from``, a local file.
        device: where the model runs; None leaves it to MMEngine.
        command: what the user gave, for the report.

    Raises:
        QuantError: if anything in the config or its files cannot be used.
    """

    def __init__(self,
                 cfg: Config,
                 device: Optional[str] = None,
                 command: Optional[Sequence[str]] = None) -> None:
        self.start = time.perf_counter()
        self.command = list(command or ())
        self.seconds: Dict[str, float] = {}
        # Predictions of which no report is written yet.
        self.unsettled: List[PredictionFile] = []
        self.work_dir = Path(str(cfg.work_dir))
        self.checkpoint = Path(cfg.load_from)
        check_writable(self.work_dir)
        truth = None
        with config_errors():
            # A data set may make its files when it is built.
            with contextlib.suppress(FileNotFoundError):
                truth = read_truth(cfg)
            self.runner = _WatchedRunner.from_cfg(cfg)
            self.hook = next(
                hook for hook in self.runner.hooks
                if isinstance(hook, SOSCalibrationHook))
            with test_data_errors(cfg):
                loop = self.runner.test_loop
                self.loader = loop.dataloader
            if truth is None:
                truth = read_truth(cfg)
        if isinstance(loop, ValLoop):
            raise QuantError('test_cfg.type: a ValLoop does not tell hooks '
                             'of a test; leave the type out.')
        try_log(self.runner)
        data_notes = check_test_data(self.runner, truth)
        self.watch = TestWatch()
        self.stopwatch = Stopwatch()
        self.runner.register_hook(self.watch)
        self.runner.register_hook(self.stopwatch)
        self.model = bare_model(self.runner)
        if device is not None:
            self.model.to(device)
        with hook_errors():
            self.runner.call_hook('before_run')
        content = read_checkpoint(self.checkpoint)
        self.given_bytes = weight_bytes(content['state_dict'])
        # A packed file brings its provenance and its settings.
        self.origin = content.get('provenance', {})
        quant = content.get('quant')
        with hook_errors():
            load_weights_(self.runner, self.model, content)
        self.model.eval()
        self.calibrated = is_calibrated(self.model)
        self.quant = (
            QuantConfig.from_dict(quant)
            if self.calibrated and quant else self.model.quant_config)
        if not self.calibrated:
            with hook_errors():
                self.hook.settle(self.runner)
            self.model = bare_model(self.runner)
            self.model.eval()
        # The report of the calibration is often in the same folder, and must
        # not be replaced.
        name = 'result_packed.json' if self.calibrated else REPORT
        self.report = self.work_dir / name
        if not self.calibrated:
            with config_errors():
                self.hook.prepare(self.runner)
        self.plan = plan_evaluation(self.runner, self.model, truth)
        half = getattr(self.runner.test_loop, 'fp16', False)
        try_metrics(self.plan, truth, self.model, half)
        for note in self.plan.notes:
            self.runner.logger.warning(note)
        self.plan.notes.extend(data_notes)

    def run(self,
            float_eval: bool,
            both_engines: bool = False) -> Dict[str, Any]:
        """Run all phases and write the report, a JSON file.

        Args:
            float_eval: whether to evaluate the float model.
            both_engines: whether to evaluate the quantized model twice, in
                the simulation and natively, instead of once as
                ``model.engine`` says. Without native kernels it is simulated
                only, and a note says why.

        Returns:
            The content of the file. Its figures of the quantized model are
            those of the last evaluation; ``also_evaluated`` has those before.
        """
        results: Dict[str, Any] = {}
        teacher = None
        if not self.calibrated:
            if float_eval:
                results['float'] = self._evaluate_float()
            # The calibration and the final comparison share one copy.
            teacher = self.hook.teacher = copy.deepcopy(self.model.backbone)
            with self._timed('calibration'):
                self.hook.before_test(self.runner)
        engines = [self.model.runtime.engine]
        if both_engines:
            engines = self._both_engines()
        evaluations = [
            self._evaluate_quantized(engine, is_last=engine == engines[-1])
            for engine in engines
        ]
        last = evaluations.pop()
        results.update(last, also_evaluated=evaluations)
        self.seconds['quantized_evaluation'] = last['seconds']
        if teacher is not None:
            self.runner.logger.info("measuring the backbone's error")
            total = min(ERROR_IMAGES, len(self.plan.indices))
            with self._timed('backbone_error'), \
                    track('backbone error', total) as advance:
                results['backbone_error'] = backbone_error(
                    self.model, teacher, read(self.loader, 'test_dataloader'),
                    advance)
        self.seconds['total'] = time.perf_counter() - self.start
        result = self._result(results)
        if is_main_process():
            write_result(self.report, result)
            if not self.calibrated:
                # There is nothing left to resume.
                shutil.rmtree(self.work_dir / WORKSPACE, ignore_errors=True)
        for file in self.unsettled:
            file.settle()
        return result

    def write_page(self) -> Optional[Path]:
        """Write the report for people, after ``run``; its path.

        All processes call this. What was measured is written before, and is
        not lost if this fails: then a warning says why, and names the command
        that makes the report again.

        Returns:
            None if it was not written, and in processes other than the first.
        """
        # All of them have kept their predictions.
        all_gather(None)
        if not is_main_process():
            return None
        name = LAYERS_PACKED if self.calibrated else LAYERS
        dataset, indices = self.loader.dataset, spread(self.plan.indices)

        def predict(place: int) -> None:
            batch = pseudo_collate([dataset[indices[place]]])
            self.model.test_step(batch)

        keep_statistics(self.model, predict, len(indices),
                        self.work_dir / name, self.key, self.runner.logger)
        return write_page_or_warn(self.report, self.runner.logger)

    def _both_engines(self) -> List[str]:
        """The simulation, and then the native kernels if there are any."""
        self.model.runtime.engine = 'native'
        how = describe_engine(self.model)
        if how['engine'] == 'native':
            return ['simulation', 'native']
        self.plan.notes.append('quantized: not evaluated natively, since '
                               f'{how["reason"]}')
        return ['simulation']

    def _evaluate_quantized(self, engine: str,
                            is_last: bool) -> Dict[str, Any]:
        """Figures of the quantized model, and how it ran.

        Args:
            engine: as for ``model.engine``.
            is_last: whether its predictions have the plain name.
        """
        self.model.runtime.engine = engine
        calls = count_calls(self.model)
        how = describe_engine(self.model)
        name = shown = 'packed' if self.calibrated else 'quantized'
        if not is_last:
            name += f'_{how["engine"]}'
            shown += f' ({how["engine"]})'
        # Engines round sums in different orders.
        key = [how[part] for part in ('engine', 'kernels')]
        evaluation = self._evaluation(
            shown, name, [*sources_of(self.runner, self.model), key],
            lambda: dict(sites=list_sites_run(self.model, calls)))
        figures = evaluation.run()
        self.unsettled.append(evaluation.file)
        self.key = evaluation.file.key
        return dict(
            quantized=figures,
            predictions=dict(name=name, key=self.key),
            engine=how,
            sites=sum_calls(evaluation.about['sites']),
            seconds=evaluation.seconds,
            seconds_per_image=evaluation.seconds_per_image)

    def close(self) -> None:
        """Call ``after_run`` of the hooks, after the table is shown."""
        with hook_errors():
            self.runner.call_hook('after_run')

    @contextlib.contextmanager
    def _test_errors(self) -> Iterator[None]:
        """Turn exceptions of a test into QuantErrors."""
        with self.watch.errors(), hook_errors():
            yield

    def _evaluation(self, shown: str, name: str, sources: List[Any],
                    describe: Callable[[], Mapping[str, Any]]) -> Evaluation:
        key = prediction_key(sources)
        file = PredictionFile(self.work_dir / PREDICTIONS, name, key)
        return Evaluation(shown, self.runner, self.plan, file, describe,
                          self._test_errors, self.stopwatch)

    def _evaluate_float(self) -> Dict[str, Any]:
        sources = sources_of(self.runner, self.model)
        evaluation = self._evaluation('float', 'float', sources,
                                      lambda: dict(peak_memory=peak_memory()))
        memory = FloatMetrics(self.work_dir, self.runner, sources)
        result = memory.recall()
        if result is not None:
            self.runner.logger.info('the float evaluation of an earlier run '
                                    'is taken over')
        else:
            with self.hook.postponed():
                result = evaluation.run()
            result.update(
                evaluation.about,
                predictions=dict(name='float', key=evaluation.file.key),
                seconds=evaluation.seconds,
                seconds_per_image=evaluation.seconds_per_image)
            if is_main_process():
                memory.keep(result)
            evaluation.file.settle()
        self.seconds['float_evaluation'] = result['seconds']
        return result

    def _result(self, results: Mapping[str, Any]) -> Dict[str, Any]:
        outcome = self.hook.outcome
        quant = self.quant
        origin = self.origin if outcome is None else outcome.provenance
        return dict(
            format_version=FORMAT_VERSION,
            config=Path(self.runner.cfg.filename).name,
            bits=quant.label,
            protocol=quant.protocol,
            overrides=[one.to_dict() for one in quant.overrides],
            scope=quant.scope,
            method=quant.method,
            lr=origin.get('sos', {}).get('lr'),
            iters=origin.get('sos', {}).get('iters'),
            float=results.get('float'),
            quantized=results['quantized'],
            engine=results['engine'],
            seconds_per_image=results['seconds_per_image'],
            also_evaluated=results['also_evaluated'],
            backbone_error=results.get('backbone_error'),
            bytes=dict(
                float=None if outcome is None else self.given_bytes,
                packed=self.packed.stat().st_size),
            seconds=self.seconds,
            peak_memory=peak_memory(),
            units=None if outcome is None else
            [vars(record) for record in outcome.records],
            sites=results['sites'],
            hooks_left_out=self.hook.left_out,
            float_modules=[
                dict(name=name, type=kind)
                for name, kind in float_modules(self.model)
            ],
            float_layers=self.model.float_layers,
            images=dict(
                evaluated=results['quantized']['images'],
                annotated=[
                    None if ids is None else len(ids)
                    for ids in self.plan.annotated
                ]),
            notes=self.plan.notes + explain_gaps(results, self.plan.nothing),
            packed=str(self.packed),
            command=self.command,
            predictions=results['predictions'],
            truth=[describe_truth(task) for task in self.plan.tasks],
            provenance=origin)

    @property
    def packed(self) -> Path:
        """Path of the packed file that was written or read."""
        outcome = self.hook.outcome
        if outcome is None:
            return self.checkpoint
        # The folder is shown as the user gave it; MMEngine resolves it.
        return self.work_dir / outcome.packed.name

    @contextlib.contextmanager
    def _timed(self, phase: str) -> Iterator[None]:
        start = time.perf_counter()
        yield
        self.seconds[phase] = time.perf_counter() - start


def load_weights_(runner: Runner, model: Any, content: Dict[str, Any]) -> None:
    """Load weights into the model of a runner, as MMEngine does.

    MMEngine's own reader knows the entry ``state_dict`` only, and refuses
    some objects that training leaves in other entries.

    Args:
        runner: its hooks are called.
        model: loads the weights.
        content: of ``read_checkpoint``.
    """
    runner.logger.info(content.pop('taken'))
    runner.call_hook('after_load_checkpoint', checkpoint=content)
    load_state_dict(model, content['state_dict'])
