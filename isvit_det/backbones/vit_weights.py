"""Adapting weights of timm's ViT, DeiT and SAM models to a backbone."""
import math
from typing import Any, Dict, Mapping, Tuple

import timm
import torch
from timm.layers import resample_abs_pos_embed
from torch import Tensor
from torch.nn import functional as F

from isvit_det.core.errors import QuantError
from isvit_det.core.files import local_checkpoint
from isvit_det.core.weights import Weights, check_values, read_weights

TIMM = 'timm://'
PREFIX_TOKENS = ('cls_token', 'dist_token')
# Parts of a classifier or of SAM's encoder that a backbone does not have.
HEADS = ('head.', 'head_dist.', 'fc_norm.', 'pre_logits.', 'neck.')


def find_weights(source: str) -> Weights:
    """Load weights from a file, an address, or a timm model by name.

    Args:
        source: path or address of a checkpoint (``.safetensors`` too), or
            ``timm://NAME``, which timm downloads.

    Raises:
        QuantError: if they cannot be loaded.
    """
    if not source.startswith(TIMM):
        return read_weights(local_checkpoint(source))
    name = source[len(TIMM):]
    try:
        state = timm.create_model(name, pretrained=True).state_dict()
    # A failed download can raise any exception.
    except Exception as error:
        raise QuantError(f'weights: timm could not provide {name!r} '
                         f'({type(error).__name__}); give a name that '
                         'timm.list_pretrained() lists, where the network '
                         'reaches them.') from error
    return Weights(state, {}, f'weights of {source}')


def fit_weights(weights: Mapping[str, Tensor],
                backbone: Any) -> Dict[str, Tensor]:
    """Adapt a state dict of timm to a backbone.

    Heads are left out. Prefix tokens, such as the class token, are dropped
    with their positions unless the backbone has them. Position embeddings are
    interpolated to the grid of the backbone.

    Args:
        weights: with timm's names.
        backbone: a ``VisionTransformer``.

    Raises:
        QuantError: naming keys that are missing, unknown, of other shapes,
            or no finite floating numbers.
    """
    state = {k: v for k, v in weights.items() if not k.startswith(HEADS)}
    tokens = [state.pop(k) for k in PREFIX_TOKENS if k in state]
    num_prefix = backbone.num_prefix_tokens
    if num_prefix > len(tokens):
        raise QuantError(
            f'weights: num_prefix_tokens={num_prefix}, but the file has '
            f'{len(tokens)} tokens before the patches; give as many or 0.')
    state.update(zip(PREFIX_TOKENS[:num_prefix], tokens))
    if 'pos_embed' in state:
        state['pos_embed'] = _fit_positions(state['pos_embed'], len(tokens),
                                            num_prefix, backbone)
    if not backbone.has_final_norm:
        state = {k: v for k, v in state.items() if not k.startswith('norm.')}
    return _fit_parameters(state, backbone)


def _fit_positions(positions: Tensor, given: int, num_prefix: int,
                   backbone: Any) -> Tensor:
    """Position embeddings (1, prefix + patches, C) on the backbone's grid.

    Args:
        positions: of the file.
        given: number of prefix tokens in the file.
        num_prefix: number of prefix tokens of the backbone.
        backbone: the backbone.
    """
    if positions.ndim == 4:
        # SAM's, without prefix.
        old: Tuple[int, int] = (positions.shape[1], positions.shape[2])
        patches, prefix = positions.flatten(1,
                                            2), positions[:, :0].flatten(1, 2)
    else:
        length = positions.shape[1]
        if math.isqrt(length)**2 == length:
            # The prefix has no positions, which is the same as zeros.
            given_zeros = positions.new_zeros(1, given, positions.shape[2])
            positions = torch.cat([given_zeros, positions], 1)
        side = math.isqrt(positions.shape[1] - given)
        if side * side != positions.shape[1] - given:
            raise QuantError(f'weights: pos_embed has {length} positions, '
                             f'{given} of them for tokens before the '
                             'patches, and the rest is no square; only '
                             'square position embeddings are supported.')
        old = (side, side)
        prefix, patches = positions[:, :given], positions[:, given:]
    patches = resample_abs_pos_embed(
        patches,
        list(backbone.grid),
        list(old),
        num_prefix_tokens=0,
        antialias=backbone.antialias)
    return torch.cat([prefix[:, :num_prefix], patches], 1)


def _fit_parameters(state: Dict[str, Tensor],
                    backbone: Any) -> Dict[str, Tensor]:
    """Compare keys and shapes, and resize relative positions."""
    parameters = dict(backbone.named_parameters())
    problems = []
    missing = [k for k in parameters if k not in state]
    if not any('.rel_pos_' in k for k in state):
        # Plain ViTs have no relative positions; they are initialised to 0.
        missing = [k for k in missing if '.rel_pos_' not in k]
    unknown = [k for k in state if k not in parameters]
    for key, value in state.items():
        if key in parameters and value.shape != parameters[key].shape:
            if '.rel_pos_' not in key:
                problems.append(f'{key} is {tuple(value.shape)} instead of '
                                f'{tuple(parameters[key].shape)}')
            else:
                state[key] = resize_relative(value, len(parameters[key]))
    for text, keys in (('missing', missing), ('unknown', unknown)):
        if keys:
            problems.append(f'{len(keys)} keys {text}: {keys[:5]}')
    if problems:
        raise QuantError(f'weights: {"; ".join(problems)}; give those of a '
                         'timm ViT or DeiT of the same size, or set arch, '
                         'patch_size, final_norm or layer_scale to fit them.')
    check_values(state, parameters)
    return state


def resize_relative(table: Tensor, length: int) -> Tensor:
    """Interpolate relative positions (L, D) linearly to (length, D)."""
    if len(table) == length:
        return table
    resized = F.interpolate(table.T[None], size=length, mode='linear')
    return resized[0].T
