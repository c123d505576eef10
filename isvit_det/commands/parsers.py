"""The command lines: what each command is given.

Nothing here imports the host's packages, so that ``--help`` answers at once.
"""
from pathlib import Path

from isvit_det.commands.parser import Parser, some_path, some_text
from isvit_det.core.presets import METHODS
from isvit_det.core.settings import SCOPES
from isvit_det.export import FORMATS

QUANTIZE_DET = """\
Evaluate a float detector, calibrate it in low bits, write a packed
checkpoint, evaluate that, and print both in one table. A run that was
interrupted is resumed by the same command. With a packed CHECKPOINT there is
only the evaluation."""
QUANTIZE_CLS = """\
Calibrate a timm ViT, DeiT or Swin classifier in low bits, write a packed
checkpoint, and compare it with the float one. A run that was interrupted is
resumed by the same command. Packed weights are evaluated only."""
REPRODUCE_TABLE = """\
Reproduce columns of the paper's table: every detector at some bits.

Each detector of the metafile is quantized by quantize_det in a folder of its
own. A cell that is done is not run again, as long as checkpoint and arguments
are the same; one that was interrupted goes on. The table of a column,
WORK_DIR/BITS_SCOPE_METHOD.md, is written anew after each cell. If a cell
fails, the table says so, the others go on, and the exit status is 1.

Before it starts, it shows about how long all of it takes on this machine, from
runs of two to four images."""
REPORT = """\
Make the report of a finished run again, WORK_DIR/report.html, from what lies
in its work directory; or put several runs side by side."""
BENCHMARK_DET = """\
Measure a packed detector on this machine: seconds of a prediction and peak
memory, in float by torch, in the simulation and on the native kernels. They
take turns, so that other work on the machine hits all of them."""
ANALYZE_DET = """\
Measure which parts of a float detector low bits hurt: each part is quantized
alone, and left in float while all others are quantized, and the detector
predicts on training images that calibrate nothing. Calibrations are in closed
form, without iterations. An analysis that was interrupted is resumed by the
same command."""
EXPORT_DET = """\
Write the backbone of a packed detector as a file for OpenVINO or onnxruntime.
The engine compiles it first: a quantized layer that it would run in float is
an error, and so is another output than the simulation's."""
CONVERT_VITDET = """\
Convert a ViTDet checkpoint of Detectron2 for a ViT config of configs/vit.
Every weight of the file is used and every weight of the config's model is
filled, or nothing is written."""
CONVERT_SWIN_OD = """\
Convert a checkpoint of Swin-Transformer-Object-Detection, MMDetection 2, for
the configs of configs/swin and for MMDetection's own Swin configs. Every
weight of the file is used and every weight of the config's model is filled,
or nothing is written."""
PUBLISH_FLOAT = """\
Keep of a training checkpoint what a float detector needs, in float32."""


def quantize_det() -> Parser:
    """The command line of quantize_det."""
    parser = Parser(QUANTIZE_DET)
    add = parser.add_argument
    add('config',
        metavar='CONFIG',
        help='one of ours, or a float config of a detector with a supported '
        'backbone: a path, mmdet::FOLDER/NAME.py or isvit_det::FOLDER/NAME.py')
    add('checkpoint',
        metavar='CHECKPOINT',
        nargs='?',
        help="float or packed file, or an address; default: the config's "
        'load_from')
    parser.add_calibration()
    add('--scope', help=' or '.join(SCOPES))
    add('--work-dir',
        type=some_text,
        help="default: the config's, or work_dirs/NAME_OF_CONFIG, with the "
        'bits, scope and method given here added to the name')
    add('--budget',
        nargs='+',
        metavar='B',
        help='choose bits of units by their sensitivity under limits: 4.5bits '
        '(mean of the weights), 20MB (packed file), 12GBOPs and 0.8s (a '
        'prediction), or ap-0.5 (the smallest that loses at most so much)')
    add('--bits-from',
        metavar='N,N,...',
        help='bits that a budget chooses from, each N or wNaM; default: '
        '3,4,6,8')
    add('--budget-by',
        choices=['unit', 'layer'],
        help='what gets bits of its own under a budget; default: unit')
    add('--budget-images',
        type=int,
        metavar='N',
        help='training images on which sensitivities are measured, beside '
        'those that calibrate; default: 32')
    add('--no-float-eval',
        action='store_true',
        help='do not evaluate the float model first')
    parser.add_engine(both=True)
    parser.add_overrides('override settings of the config, or of the '
                         'quantization: quant.KEY=VALUE, sos.KEY=VALUE')
    add('--launcher',
        choices=['none', 'pytorch', 'slurm', 'mpi'],
        default='none',
        help='how this process was started as one of several, which share '
        'the images; on GPUs, or on CPUs where there are none')
    add('--local_rank', '--local-rank', type=int)
    return parser


def quantize_cls() -> Parser:
    """The command line of quantize_cls."""
    parser = Parser(QUANTIZE_CLS)
    add = parser.add_argument
    add('model',
        metavar='MODEL',
        help='a timm classifier: vit_*, deit*_* or swin_*')
    add('--weights',
        required=True,
        type=some_text,
        metavar='FILE',
        help='its weights or a packed file, a path or an address; timm://NAME '
        'has timm download them')
    add('--calib',
        type=some_path,
        metavar='DIR',
        help='images to calibrate on, in any folders')
    add('--val',
        type=some_path,
        metavar='DIR',
        help='images to evaluate: a folder for each class, empty or not, '
        'gives top-1 and top-5, any other agreement and KL only; hidden '
        'files and folders are passed by; default: those of --calib that '
        'were not drawn')
    parser.add_calibration()
    add('--items',
        help="'unit' (default) draws windows and query rows, 'image' whole "
        'images')
    add('--batch',
        type=int,
        metavar='N',
        help='items, or whole images, per iteration')
    parser.add_overrides(
        'other settings, such as quant.exponent=integer or sos.lr=1e-4')
    add('--work-dir',
        type=some_text,
        help='default: work_dirs/MODEL, with the bits and the method given '
        'here added to the name')
    add('--eval-batch', type=int, default=32, metavar='N')
    add('--workers',
        type=int,
        default=0,
        metavar='N',
        help='processes that read evaluation images')
    parser.add_engine()
    return parser


def report() -> Parser:
    """The command line of report."""
    parser = Parser(REPORT)
    add = parser.add_argument
    add('work_dir',
        metavar='WORK_DIR',
        nargs='?',
        type=some_path,
        help='of a finished run of quantize_det or quantize_cls')
    add('--compare',
        nargs='+',
        default=[],
        type=some_path,
        metavar='DIR',
        help='put these runs side by side, after WORK_DIR if it is given; the '
        'accuracy and the pictures are of the same images in all')
    add('--out',
        type=some_path,
        metavar='FILE',
        help='of --compare; default: comparison.html in the first folder')
    return parser


def reproduce_table() -> Parser:
    """The command line of reproduce_table."""
    parser = Parser(REPRODUCE_TABLE)
    add = parser.add_argument
    add('--bits',
        nargs='+',
        default=['w4a4'],
        metavar='wNaM',
        help="the columns, of the metafile's; default: w4a4")
    add('--checkpoints',
        nargs='+',
        default=[],
        metavar='DETECTOR=FILE',
        help='float checkpoints, files or addresses, such as '
        'mask-rcnn_swin-t=swin-t.pth; or a folder of files DETECTOR.pth')
    add('--download',
        action='store_true',
        help='download those that are not given from the addresses of the '
        'metafile, and convert what needs it')
    add('--models',
        nargs='+',
        metavar='DETECTOR',
        help='run these only; default: all that have a checkpoint')
    add('--scope', choices=SCOPES, default='detector')
    add('--method', choices=list(METHODS), default='isvit')
    add('--calib-images',
        type=int,
        metavar='N',
        help="such as 512; default: the configs', 1024")
    add('--data-root',
        type=some_text,
        metavar='DIR',
        help="COCO; default: the configs'")
    add('--work-dir', type=some_path, default=Path('work_dirs/table'))
    add('--cfg-options',
        nargs='+',
        default=[],
        metavar='KEY=VALUE',
        help='override settings of every config')
    add('--metafile', type=some_path, help="default: the package's own")
    add('--no-estimate',
        action='store_true',
        help='start at once, without saying how long it takes')
    parser.add_verbose()
    return parser


def benchmark_det() -> Parser:
    """The command line of benchmark_det."""
    parser = Parser(BENCHMARK_DET)
    parser.add_packed()
    add = parser.add_argument
    add('--image',
        metavar='FILE',
        help='what to predict on; default: noise of the size that the config '
        'tests')
    add('--threads',
        type=int,
        nargs='+',
        default=[1],
        metavar='N',
        help='default: 1; memory and layers are measured with the first')
    add('--rounds', type=int, default=5, metavar='N', help='default: 5')
    add('--layers',
        action='store_true',
        help='time each quantized layer by itself as well')
    add('--json',
        type=some_path,
        metavar='FILE',
        help='write all figures there')
    return parser


def analyze_det() -> Parser:
    """The command line of analyze_det."""
    parser = Parser(ANALYZE_DET)
    add = parser.add_argument
    add('config', metavar='CONFIG', help='as for quantize_det')
    add('checkpoint',
        metavar='CHECKPOINT',
        nargs='?',
        help="float file, or an address; default: the config's load_from")
    add('--bits',
        nargs='+',
        metavar='wNaM',
        help="what to measure at; default: the config's, or w4a4")
    add('--by',
        choices=['unit', 'layer'],
        default='unit',
        help='what a part is: a unit of the calibration, the neck or a head '
        "(default), or a single layer; 'layer' rounds weights to the nearest")
    add('--measure',
        choices=['features', 'detections', 'ap'],
        default='detections',
        help='the most costly measure; cheaper ones are measured as well: '
        "'features', the error of the heads' input or of a head's layers, "
        "'detections' (default), the share of detections that are not found "
        "again, 'ap', points of box AP lost")
    add('--images',
        type=int,
        default=32,
        metavar='N',
        help='training images to measure on; default: 32')
    add('--mode',
        choices=['alone', 'rest', 'both'],
        default='both',
        help="'alone' quantizes one part, 'rest' all but one; default: both")
    add('--scope', help=' or '.join(SCOPES))
    parser.add_method()
    add('--work-dir',
        type=some_text,
        help='default: work_dirs/NAME_OF_CONFIG_analysis')
    parser.add_overrides('as for quantize_det')
    parser.add_verbose()
    return parser


def export_det() -> Parser:
    """The command line of export_det."""
    parser = Parser(EXPORT_DET)
    parser.add_packed()
    add = parser.add_argument
    add('--to',
        required=True,
        choices=FORMATS,
        help="'openvino', its IR, or 'onnx', for onnxruntime and others that "
        'read QuantizeLinear')
    add('--shape',
        type=some_text,
        default='dynamic',
        metavar='HxW',
        help='of the images as the detector pads them, such as 800x1344; '
        "'dynamic' (default) for any, which a ViT cannot")
    add('--out',
        type=some_path,
        metavar='DIR',
        help='folder of the files; default: one named after the format, '
        'beside PACKED')
    add('--allow-float',
        nargs='+',
        default=[],
        metavar='NAME',
        help='quantized layers of the backbone that may run in float')
    add('--vnni',
        action='store_true',
        help='every CPU that will run the file has VNNI: 8-bit weights need '
        'not be divided')
    return parser


def convert_vitdet() -> Parser:
    """The command line of convert_vitdet."""
    return _converter(CONVERT_VITDET,
                      'model_final_*.pkl, or a file of torch.save')


def convert_swin_od() -> Parser:
    """The command line of convert_swin_od."""
    return _converter(CONVERT_SWIN_OD, 'its file, such as of Swin-T')


def _converter(description: str, source: str) -> Parser:
    parser = Parser(description)
    add = parser.add_argument
    add('source', type=some_path, help=source)
    add('out', type=some_path, help='the file to write')
    add('--config',
        required=True,
        type=some_text,
        help='the float config to fit')
    return parser


def publish_float() -> Parser:
    """The command line of publish_float."""
    parser = Parser(PUBLISH_FLOAT)
    add = parser.add_argument
    add('source',
        type=some_path,
        help='a checkpoint, or a work directory: its last one')
    add('out', type=some_path, help='the file to write')
    return parser
