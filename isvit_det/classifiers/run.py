"""One run of a classifier: calibration, then float against quantized."""
import shutil
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence, Tuple

import torch
from mmengine.logging import MMLogger
from timm.data import create_transform, resolve_model_data_config
from torch import Tensor

from isvit_det.backbones.vit_weights import TIMM, find_weights
from isvit_det.calibration.events import UnitRecord
from isvit_det.calibration.sos import calibrate
from isvit_det.calibration.store import ActivationPool
from isvit_det.checkpoint import is_packed, save_packed, verified
from isvit_det.classifiers.images import (FolderSample, ImageList,
                                          class_labels, find_images,
                                          other_pictures)
from isvit_det.classifiers.models import build_classifiers
from isvit_det.core.errors import QuantError, few_names
from isvit_det.core.files import check_writable, local_checkpoint
from isvit_det.core.layers import is_calibrated
from isvit_det.core.plain import plain
from isvit_det.core.settings import QuantConfig, SOSConfig
from isvit_det.detector import float_modules
from isvit_det.engine.calibrate import WORKSPACE
from isvit_det.engine.layer_statistics import keep_statistics, spread
from isvit_det.inputs.datasets import find_overlap, refuse_overlap
from isvit_det.packed.state import packed_config
from isvit_det.page.write import write_page_or_warn
from isvit_det.report.classifier_table import classifier_rows
from isvit_det.report.layer_file import LAYERS, LAYERS_PACKED
from isvit_det.report.progress import CalibrationProgress, announcement
from isvit_det.report.provenance import describe_origin, fingerprint
from isvit_det.report.tables import (count_calls, format_table, list_sites_run,
                                     peak_memory, silent_sites, weight_bytes,
                                     write_result)
from isvit_det.runtime.engine import attach_runtime_, describe_engine
from isvit_det.screen.output import watch
from isvit_det.screen.progress import track

FORMAT_VERSION = 1
# Limits of options: images of a batch, and processes that read images.
MAX_BATCH = 2**16
MAX_WORKERS = 2**10
# Most images that are evaluated without --val.
MAX_REST = 1000


@dataclass
class Scores:
    """Sums of scores over images, whose means are reported."""
    count: int = 0
    agreement: float = 0.
    kl: float = 0.
    correct: Dict[str, float] = field(default_factory=dict)

    def add(self, teacher: Optional[Tensor], student: Tensor,
            labels: Optional[Tensor]) -> None:
        """Add a batch of logits.

        Args:
            teacher: of the float classifier, shape (B, classes), if there is
                one.
            student: of the quantized classifier, shape (B, classes).
            labels: shape (B,), if they are known.
        """
        self.count += len(student)
        if teacher is not None:
            same = teacher.argmax(1) == student.argmax(1)
            self.agreement += same.sum().item()
            log_p = teacher.double().log_softmax(1)
            log_q = student.double().log_softmax(1)
            self.kl += (log_p.exp() * (log_p - log_q)).sum().item()
        if labels is not None:
            for name, logits in (('float', teacher), ('quantized', student)):
                for k in (1, 5):
                    if logits is not None:
                        best = logits.topk(min(k, logits.shape[1]), 1).indices
                        hits = (best == labels[:, None]).sum().item()
                        key = f'{name}_top{k}'
                        self.correct[key] = self.correct.get(key, 0) + hits

    def means(self, has_teacher: bool) -> Dict[str, Any]:
        """Agreement and accuracies as fractions, KL in nats."""
        num = max(1, self.count)
        means: Dict[str, Any] = dict(images=self.count)
        if has_teacher:
            means.update(agreement=self.agreement / num, kl=self.kl / num)
        means.update({k: v / num for k, v in self.correct.items()})
        return means


class ClassifierRun:
    """Calibrates a timm classifier and compares it with the float one.

    Packed weights are only evaluated. The constructor checks all input.

    Args:
        name: of the timm model.
        weights: path or address of its weights or of a packed file, or
            ``timm://NAME``.
        calib: folder of calibration images; may be None for packed weights.
        val: folder of evaluation images; None takes images of ``calib`` that
            are not used for the calibration.
        quant: values of ``QuantConfig`` that the user gave.
        sos: values of ``SOSConfig`` that the user gave.
        work_dir: for the packed file and the report.
        device: of both models.
        store_gb: memory for activations in GB (1e9 bytes).
        batch: images per evaluation step.
        workers: processes that read evaluation images.
        engine: what runs the quantized classifier when it is evaluated, see
            ``attach_runtime_``.
        command: what the user gave, for the report.

    Attributes:
        report: path of the JSON file that ``run`` writes.

    Raises:
        QuantError: if anything cannot be used.
    """

    def __init__(self,
                 name: str,
                 weights: str,
                 calib: Optional[Path],
                 val: Optional[Path],
                 quant: Mapping[str, Any],
                 sos: Mapping[str, Any],
                 work_dir: Path,
                 device: str = 'cpu',
                 store_gb: Optional[float] = None,
                 batch: int = 32,
                 workers: int = 0,
                 engine: str = 'auto',
                 command: Sequence[str] = ()) -> None:
        check_writable(work_dir)
        self.command = list(command)
        # The constructor checks the budget.
        ActivationPool(work_dir, store_gb)
        for option, value, low, high in (('--eval-batch', batch, 1, MAX_BATCH),
                                         ('--workers', workers, 0,
                                          MAX_WORKERS)):
            if not low <= value <= high:
                raise QuantError(f'{option}: {value} is not allowed; expected '
                                 f'an integer between {low} and {high}.')
        self.name = name
        self.work_dir = work_dir
        self.device = device
        self.store_gb = store_gb
        self.batch = batch
        self.workers = workers
        if not weights.startswith(TIMM):
            weights = str(local_checkpoint(weights))
        self.checkpoint = weights
        loaded = find_weights(weights)
        state = loaded.state_dict
        self.packed = is_packed(dict(state_dict=state))
        self.origin: Dict[str, Any] = {}
        if self.packed:
            content = verified(loaded, Path(weights))
            self.origin = content.get('provenance', {})
            config = packed_config(state, quant)
        else:
            config = QuantConfig.from_dict(quant)
        self.report = work_dir / ('result_packed.json'
                                  if self.packed else 'result.json')
        self.source, self.model = build_classifiers(name, state, config,
                                                    self.packed)
        attach_runtime_(self.model, engine)
        self.source.to(device)
        self.model.to(device)
        self.sos = SOSConfig.from_dict(sos, config, 'classifier')
        self.transform = create_transform(
            **resolve_model_data_config(self.source))
        self.logger = MMLogger.get_instance('quantize_cls')
        watch(self.logger)
        self.notes: List[str] = []
        self.taken = loaded.summary
        self.logger.info(self.taken)
        self.sample: Optional[FolderSample] = None
        if not self.packed:
            if calib is None:
                raise QuantError('--calib: give a folder of images to '
                                 'calibrate on.')
            self.sample = FolderSample(calib, self.transform,
                                       self.sos.num_images, self.sos.seed)
            self._note_left_out('--calib', calib)
            if len(self.sample) < self.sample.asked:
                self._note(f'{self.sample.asked} calibration images asked '
                           f'for, there are {len(self.sample)}: all are used')
        self._choose_evaluation(val)
        self.evaluated.check()
        if not len(self.evaluated):
            self._note('no image is left to evaluate: give --val')

    def _note(self, text: str) -> None:
        """Log a warning, and keep it for the report."""
        self.logger.warning(text)
        self.notes.append(text)

    def _note_left_out(self, option: str, folder: Path) -> None:
        names = [path.name for path in other_pictures(folder)]
        if names:
            self._note(f'{option}: {len(names)} files are of formats that are '
                       f'not read as images, and left out: {few_names(names)}')

    def _choose_evaluation(self, val: Optional[Path]) -> None:
        """Choose the evaluation images, and hash the calibration images."""
        self.labels: List[int] = []
        self.hashes: List[str] = []
        drawn = [] if self.sample is None else self.sample.paths()
        if val is None:
            rest = [] if self.sample is None else self.sample.rest[:MAX_REST]
            # A folder may contain the same image twice.
            self.hashes, overlap = find_overlap(drawn, rest)
            rest = [path for path in rest if path not in overlap]
            self.evaluated = ImageList(rest, self.transform)
            return
        self._choose_labels(val, find_images(val, '--val'))
        self._note_left_out('--val', val)
        self.hashes = refuse_overlap(drawn, list(self.evaluated.paths))

    def _choose_labels(self, val: Path, paths: List[Path]) -> None:
        """Evaluate a folder, with labels if it has class folders."""
        self.evaluated = ImageList(paths, self.transform)
        classes, labels = class_labels(val, paths)
        known = self.model.head.num_classes
        used = set(labels) - {None}
        if not used:
            # The folder is flat.
            return
        empty = [name for i, name in enumerate(classes) if i not in used]
        if len(classes) != known:
            without = f', {len(empty)} without an image' if empty else ''
            self._note(f'--val has {len(classes)} class folders{without}, the '
                       f'model {known} classes: no top-1, only agreement')
            return
        kept = [(path, i) for path, i in zip(paths, labels) if i is not None]
        self.labels = [i for _, i in kept]
        self.evaluated = ImageList([path for path, _ in kept], self.transform)
        if empty:
            self._note(f'--val: {len(empty)} class folders have no image, and '
                       f'keep their labels: {few_names(empty)}')
        strays = [path.name for path, i in zip(paths, labels) if i is None]
        if strays:
            self._note(f'--val: {len(strays)} images lie in no class folder '
                       f'and are not evaluated: {few_names(strays)}')

    def run(self) -> Dict[str, Any]:
        """Calibrate, pack, evaluate, and write ``result.json``.

        Returns:
            What the file holds.
        """
        records: Optional[List[UnitRecord]] = None
        seconds: Dict[str, float] = {}
        packed = Path(self.checkpoint)
        origin = self.origin
        start = time.perf_counter()
        if not self.packed:
            assert self.sample is not None
            origin = plain(
                dict(
                    describe_origin(self.model, self.checkpoint, self.sample,
                                    self.sos),
                    model=self.name))
            records = self._calibrate(origin)
            packed = self.work_dir / 'packed.pth'
            save_packed(self.model, packed, origin, {})
            seconds['calibration'] = time.perf_counter() - start
        start = time.perf_counter()
        scores, sites = self._evaluate()
        seconds['evaluation'] = time.perf_counter() - start
        config = self.model.quant_config
        result = dict(
            format_version=FORMAT_VERSION,
            model=self.name,
            bits=config.label,
            protocol=config.protocol,
            overrides=[one.to_dict() for one in config.overrides],
            method=config.method,
            scores=scores,
            engine=describe_engine(self.model),
            bytes=dict(
                float=weight_bytes(self.source.state_dict()),
                packed=packed.stat().st_size),
            seconds=seconds,
            peak_memory=peak_memory(),
            units=None
            if records is None else [vars(record) for record in records],
            sites=sites,
            notes=self.notes,
            weights=self.taken,
            float_modules=[
                dict(name=name, type=kind)
                for name, kind in float_modules(self.model)
            ],
            packed=str(packed),
            command=self.command,
            provenance=origin)
        self.layers.unlink(missing_ok=True)
        write_result(self.report, result)
        if not self.packed:
            # There is nothing left to resume.
            shutil.rmtree(self.work_dir / WORKSPACE, ignore_errors=True)
        return result

    @property
    def layers(self) -> Path:
        """Path of the statistics of the layers."""
        return self.work_dir / (LAYERS_PACKED if self.packed else LAYERS)

    def write_page(self) -> Optional[Path]:
        """Write the report for people, after ``run``; its path.

        Returns:
            None if it was not written; a warning says why.
        """
        images = self.evaluated if len(self.evaluated) else self.sample
        if images is not None:
            indices = spread(range(len(images)))

            def predict(place: int) -> None:
                self.model(self._image(indices[place]))

            keep_statistics(self.model, predict, len(indices), self.layers, '',
                            self.logger)
        return write_page_or_warn(self.report, self.logger)

    def _image(self, index: int) -> Tensor:
        """An evaluated image, or if there is none one of the calibration."""
        if len(self.evaluated):
            return self.evaluated[index][0][None].to(self.device)
        assert self.sample is not None
        path = self.sample.paths()[index]
        return ImageList([path], self.transform)[0][0][None].to(self.device)

    def _calibrate(self, origin: Mapping[str, Any]) -> List[UnitRecord]:
        assert self.sample is not None
        config = self.model.quant_config
        units = self.model.units()
        self.logger.info(
            announcement(config, self.sos, len(units), len(self.sample)))
        with CalibrationProgress(self.logger, units) as progress:
            return calibrate(
                self.model,
                self.sample.tensors(self.sos.mirror_images),
                config,
                self.sos,
                self.work_dir / WORKSPACE,
                fingerprint(origin, self.hashes, [str(self.transform)],
                            self.model),
                store_gb=self.store_gb,
                on_event=progress)

    @torch.no_grad()
    def _evaluate(self) -> Tuple[Dict[str, Any], List[Dict[str, Any]]]:
        """Scores on the evaluation images, and the sites that ran.

        Raises:
            QuantError: naming sites that did not run quantized.
        """
        assert is_calibrated(self.model)
        scores = Scores()
        before = count_calls(self.model)
        if not len(self.evaluated):
            return scores.means(False), []
        labels = torch.tensor(self.labels) if self.labels else None
        num = len(self.evaluated)
        self.logger.info(f'evaluating on {num} images')
        with track('evaluating', num) as advance:
            batches = self.evaluated.batches(self.batch, self.workers)
            for images, index in batches:
                images = images.to(self.device)
                teacher = None if self.packed else self.source(images).cpu()
                scores.add(teacher,
                           self.model(images).cpu(),
                           None if labels is None else labels[index])
                advance(len(images))
        sites = list_sites_run(self.model, before)
        assert not silent_sites(sites)
        return scores.means(not self.packed), sites


def table(result: Mapping[str, Any]) -> str:
    """A result as a table: the float and the quantized classifier."""
    return format_table(classifier_rows(result))
