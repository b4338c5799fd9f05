"""How the layers are computed fastest: the one place that chooses a kernel, by device, precision and shape.

What is computed stands in layers.py. On CUDA and elsewhere PyTorch's own kernels are the fast ones. On an x86 CPU,
where a step of Stable Diffusion 1.x is 1,600 GFLOP, three of its choices cost up to half of the time:

    convolutions   re-lay their weights at every call      -> laid out once, by oneDNN (`Conv2d`; 1x1 as linear layers)
    linear layers  the same; in float32 they go to MKL     -> laid out once, and through oneDNN (`Linear`)
    attention      reaches a sixth of the processor's peak -> two plain products, some queries at a time (`attention`)

Layers change the layout of their weights when they are first used without gradients; the weight is then an opaque
tensor of oneDNN, and no second copy is kept. Nobody has to know: `state_dict`, `load_state_dict`, `to`, `float`,
`train`, copying and derivatives with respect to the input work as ever, and `plain` undoes it for whoever wants to look
at or change weights.

>>> layer = Linear(8, 4).requires_grad_(False)
>>> weight, x = layer.weight.clone(), torch.randn(2, 8)
>>> torch.allclose(layer(x), F.linear(x, weight, layer.bias), atol=1e-5)  # whatever became of its weight
True
>>> plain(layer).weight.equal(weight)
True
>>> attention(*torch.randn(3, 1, 6, 16), heads=2).shape  # of 6 tokens to each other, 2 times 8 wide
torch.Size([1, 6, 16])
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import forward_ad

BY_ROWS_FROM = {torch.bfloat16: 1, torch.float32: 512}  # keys from which attention by rows is faster, on x86
SCORES = 2**20  # how many of its scores a thread computes at a time: 2 to 4 MB, which stay in the cache
THREADS = 2, 4  # for so many threads at least and at most: below calls cost more than the cache saves, above it is full
# but so many queries at least, as the keys are brought into order for each product
ROWS = {torch.bfloat16: 512, torch.float32: 256}
LARGEST_EXPONENT = 100.0  # from 2^-100 to 2^100 numbers are exact, as the smallest float32 and bfloat16 is 2^-126
LARGEST_SUM = 126.0  # and the largest 2^127: of the values, each times such a power, over all keys
LANES = 16  # numbers in a vector register: a matrix is padded to whole ones

LARGE = 1024  # pixels from which GroupNorm goes another way in PyTorch, with sums that are too rough
PART = 2**18  # how many numbers it adds up at a time: 1 MB, which stays in the cache


@cache
def onednn_dtypes() -> frozenset[torch.dtype]:
    """The precisions in which oneDNN's operators with laid-out weights can be used and pay: none but on x86 CPUs."""
    if not (torch.backends.mkldnn.is_available() and torch.backends.cpu.get_cpu_capability().startswith("AVX")):
        return frozenset()
    try:
        half = torch.ops.mkldnn._is_mkldnn_bf16_supported()
        _try_operators()
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return frozenset()  # a torch that was built without them, or where they want other arguments
    return frozenset({torch.float32, torch.bfloat16} if half else {torch.float32})


def _try_operators() -> None:
    """Use each of oneDNN's operators once: they are for torch's own compiler, and may change with any version."""
    with torch.no_grad():
        x = torch.ones(1, LANES, 2, 2, device="cpu", dtype=torch.float32)
        weight, usual = torch.ones(LANES, LANES, device="cpu", dtype=torch.float32), ((0, 0), (1, 1), (1, 1), 1)
        _linear(x[..., 0, 0], _linear_weight(weight, 1), None)
        _convolution(x, _kernel(weight[..., None, None], *usual, x.shape), None, *usual)


def _linear_weight(weight: Tensor, rows: int | None = None) -> Tensor:
    """The weight (D_out, D_in) in the layout that is fastest for so many rows."""
    return torch.ops.mkldnn._reorder_linear_weight(weight, rows)


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """F.linear with a weight that is laid out."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def _kernel(kernel: Tensor, padding, stride, dilation, groups: int, shape: torch.Size) -> Tensor:
    """The kernel of a convolution in the layout that is fastest for inputs of this shape."""
    return torch._C._nn.mkldnn_reorder_conv2d_weight(kernel.to_mkldnn(), padding, stride, dilation, groups, shape)


def _convolution(x: Tensor, kernel: Tensor, bias: Tensor | None, padding, stride, dilation, groups: int) -> Tensor:
    """F.conv2d with a kernel that is laid out."""
    return torch.ops.mkldnn._convolution_pointwise(x, kernel, bias, padding, stride, dilation, groups, "none", [], "")


def lays_out(device: torch.device, dtype: torch.dtype) -> bool:
    """Whether layers will lay their weights out when they are used there, so that it does not matter how they come."""
    return device.type == "cpu" and dtype in onednn_dtypes() and torch.backends.mkldnn.enabled


def _watched(*tensors: Tensor | None) -> bool:
    """Whether more than the result is wanted: gradients for any of these, other transforms, a graph for a compiler.

    oneDNN's operators know of none of these: in silence derivatives would be zero.
    """
    if torch.compiler.is_compiling() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active():
        return True
    if forward_ad._current_level >= 0:  # some may have tangents
        return True
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in tensors)


_laying_out = threading.Lock()  # two threads may use a layer for the first time


class _LaidOut(nn.Module):
    """A layer whose `weight` may be in oneDNN's layout; it is plain wherever anything but `forward` sees it."""

    weight: nn.Parameter
    stays_plain = False

    def lay_out(self, x: Tensor) -> nn.Parameter:
        """The weight in the layout that is fastest for an input like x."""
        raise NotImplementedError

    def takes(self, x: Tensor) -> bool:
        """Whether x has the usual shape; of others, PyTorch's own operators say best what is wrong."""
        raise NotImplementedError

    def ready(self, x: Tensor) -> bool:
        """Whether oneDNN's operator can take x; lays the weight out if that has not been done."""
        weight = self.weight
        if weight.is_mkldnn and weight.requires_grad and torch.is_grad_enabled():
            raise RuntimeError(
                "a weight that is to be trained was laid out for inference: call sd.runtime.cpu_kernels.plain(network) "
                "and then make the optimizer"
            )
        if (
            x.device.type != "cpu"
            or x.dtype != weight.dtype
            or type(x) is not Tensor  # but a tensor that only pretends to have numbers, for example
            or not self.takes(x)
            or _watched(x, weight, self.bias)
        ):
            return False
        if weight.is_mkldnn:
            return True
        if (
            self.stays_plain
            or weight.dtype not in onednn_dtypes()
            or weight.requires_grad
            or weight.device.type != "cpu"
            or not isinstance(weight, nn.Parameter)  # but computed from others
            or x.numel() == 0
            or torch.is_autocast_enabled("cpu")
            or not torch.backends.mkldnn.enabled
        ):
            return False
        with _laying_out, torch.no_grad():
            if not self.weight.is_mkldnn:
                self.weight = self.lay_out(x)
        return True

    def plain_weight(self) -> Tensor:
        """The weight as it came, to the bit."""
        weight = self.weight
        if not weight.is_mkldnn:
            return weight
        with torch._C._DisableFuncTorch():  # which cannot look into it
            dense = weight.to_dense()
        return dense.contiguous(memory_format=torch.channels_last) if dense.dim() == 4 else dense

    def make_plain(self) -> None:
        """Go back to the layout that everybody knows."""
        if self.weight.is_mkldnn:
            self.weight = nn.Parameter(self.plain_weight(), self.weight.requires_grad)

    def train(self, mode: bool = True):
        """As nn.Module's; for training weights are plain."""
        if mode and not self.weight.requires_grad:  # an optimizer may have it: then `ready` says what to do
            self.make_plain()
        return super().train(mode)

    def __getstate__(self):  # for copying and pickling
        weight = self.weight
        weight = nn.Parameter(self.plain_weight(), weight.requires_grad) if weight.is_mkldnn else weight
        return self.__dict__ | {"_parameters": self._parameters | {"weight": weight}}

    def _apply(self, fn, recurse=True):  # to, float, cuda, share_memory, ...
        self.make_plain()
        return super()._apply(fn, recurse)

    def _save_to_state_dict(self, destination, prefix, keep_vars):
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.weight.is_mkldnn:
            destination[prefix + "weight"] = self.plain_weight()

    def _load_from_state_dict(self, *args, **kwargs):
        self.make_plain()
        super()._load_from_state_dict(*args, **kwargs)


def plain(module: nn.Module) -> nn.Module:
    """The module with all weights in the layout that everybody knows, to look at them or to change them."""
    for layer in module.modules():
        if isinstance(layer, _LaidOut):
            layer.make_plain()
    return module


def keep_plain(module: nn.Module) -> nn.Module:
    """The same for good, and kernels channels-last: for compilers, which choose layouts themselves.

    To be called before `torch.compile` where a network has been used: compilers cannot look into oneDNN's layouts.
    """
    for layer in plain(module).modules():
        if isinstance(layer, _LaidOut):
            layer.stays_plain = True
    return module.to(memory_format=torch.channels_last)


class Linear(_LaidOut, nn.Linear):
    """nn.Linear; faster on x86 CPUs when no gradients are wanted."""

    def lay_out(self, x: Tensor) -> nn.Parameter:
        return nn.Parameter(_linear_weight(self.weight, x.numel() // x.shape[-1]), requires_grad=False)

    def takes(self, x: Tensor) -> bool:
        return x.dim() > 0 and x.shape[-1] == self.in_features

    def forward(self, x: Tensor) -> Tensor:
        """(..., D_in) -> (..., D_out)."""
        if self.ready(x):
            return _linear(x, self.weight, self.bias)
        return F.linear(x, self.plain_weight(), self.bias)


class Conv2d(_LaidOut, nn.Conv2d):
    """nn.Conv2d; faster on x86 CPUs when no gradients are wanted.

    Kernels of 1x1 are linear layers of pixels: as those their layout is good for pictures of any size, which as kernels
    it is not. (At 256x256 a step took half as long again where the one before was of 512x512.)
    """

    @property
    def by_pixel(self) -> bool:
        """Whether each pixel of the result depends on one pixel."""
        return self.kernel_size == self.stride == (1, 1) and self.padding == (0, 0) and self.groups == 1

    def plain_weight(self) -> Tensor:
        weight = super().plain_weight()
        if weight.dim() == 4:
            return weight
        return weight[:, :, None, None].contiguous(memory_format=torch.channels_last)

    def lay_out(self, x: Tensor) -> nn.Parameter:
        if self.by_pixel:
            rows = x.numel() // x.shape[1]
            return nn.Parameter(_linear_weight(self.weight.flatten(1), rows), requires_grad=False)
        kernel = _kernel(self.weight, self.padding, self.stride, self.dilation, self.groups, x.shape)
        return nn.Parameter(kernel, requires_grad=False)

    def takes(self, x: Tensor) -> bool:
        return x.dim() == 4 and x.shape[1] == self.in_channels

    def forward(self, x: Tensor) -> Tensor:
        """(B, C_in, H, W) -> (B, C_out, H', W')."""
        if self.ready(x):
            if self.by_pixel:
                return _linear(x.permute(0, 2, 3, 1).contiguous(), self.weight, self.bias).permute(0, 3, 1, 2)
            return _convolution(x, self.weight, self.bias, self.padding, self.stride, self.dilation, self.groups)
        return self._conv_forward(x, self.plain_weight(), self.bias)


class EnlargingConv2d(Conv2d):
    """A 3x3 convolution (padding 1) of a map that is first enlarged by nearest neighbours.

    Of the nine pixels that a kernel sees in a doubled map only four differ. So each pixel of the result is a 2x2
    convolution of the small map by sums of the kernel's rows and columns: with 4/9 of the arithmetic. A doubled pixel
    has four places, hence four kernels, which are one of four times the channels. By rows, for a kernel a, b, c:

        row 2i     sees rows i - 1, i, i of the small map: a, b + c
        row 2i + 1 sees rows i, i, i + 1:                  a + b, c
    """

    def __init__(self, channels: int) -> None:
        super().__init__(channels, channels, 3, padding=1)

    def lay_out(self, x: Tensor) -> nn.Parameter:
        C = self.in_channels
        sums = self.weight.new_tensor([[[1, 0, 0], [0, 1, 1]], [[1, 1, 0], [0, 0, 1]]]).float()  # (place, of 2, of 3)
        kernels = torch.einsum("ral,scm,oilm->rsoiac", sums, sums, self.weight.float()).reshape(4 * C, C, 2, 2)
        weight = super().lay_out(x)
        # beside the weight that they are made of: where that is exchanged, they go with it
        weight.places = _kernel(kernels.to(self.weight.dtype), (1, 1), (1, 1), (1, 1), 1, x.shape)
        return weight

    def forward(self, x: Tensor, size: tuple[int, int] | None = None) -> Tensor:
        """(B, C, H, W) -> (B, C, *size); twice the size where none is given."""
        B, C, H, W = x.shape
        size = size or (2 * H, 2 * W)
        if size != (2 * H, 2 * W) or not self.ready(x):
            return super().forward(F.interpolate(x, size=size, mode="nearest"))
        bias = None if self.bias is None else self.bias.repeat(4)
        x = _convolution(x, self.weight.places, bias, (1, 1), (1, 1), (1, 1), 1)
        out = torch.empty((B, C, *size), dtype=x.dtype, device=x.device, memory_format=torch.channels_last)
        for place, part in enumerate(x.chunk(4, dim=1)):  # (B, C, H + 1, W + 1): a row and a column too many
            row, column = divmod(place, 2)
            out[:, :, row::2, column::2] = part[:, :, row : row + H, column : column + W]
        return out


def attention(q: Tensor, k: Tensor, v: Tensor, heads: int, causal: bool = False) -> Tensor:
    """Multi-head attention: q (B, N, D), k and v (B, M, D) -> (B, N, D).

    PyTorch's fused kernel never builds the N x M matrix; it scales before the softmax and sums in float32, which keeps
    half precision safe. `causal` lets token n see tokens 0..n only (M = N).
    """
    watched = _watched(q, k, v)
    q, k, v = (x.unflatten(-1, (heads, -1)).transpose(1, 2) for x in (q, k, v))  # (B, heads, N, d)
    if (
        not (causal or watched)
        and type(q) is Tensor
        and lays_out(q.device, q.dtype)
        and k.shape[2] >= BY_ROWS_FROM[q.dtype]
        and k.shape[0] == q.shape[0]
        and q.numel() > 0
    ):
        x = _attention_by_rows(q, k, v)
    elif q.device.type == "mps":
        # Its kernels have been wrong for transposed inputs (pytorch#163597) and for is_causal in half precision
        # (pytorch#195910), without an error.
        mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril() if causal else None
        x = F.scaled_dot_product_attention(q.contiguous(), k.contiguous(), v.contiguous(), attn_mask=mask)
    else:
        x = F.scaled_dot_product_attention(q, k, v, is_causal=causal)
    return x.transpose(1, 2).flatten(-2)  # (B, N, D)


def _attention_by_rows(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """The same for q (B, heads, N, d) and k, v (B, heads, M, d) by the formula, some heads and queries at a time.

    softmax(s) v = (exp(s) v) / (exp(s) 1): one pass over the scores instead of three, the sum is one more column of v,
    and a power of 2 is faster than one of e. Without the maximum taken off, exp and the sums could overflow; |q| |k|
    bounds it, and where that is large (it hardly ever is) the usual softmax is taken.

    In bfloat16 scores are rounded before the softmax: an error of 0.5 % against 0.2 % in the fused kernel where they
    are about 1, more where they are larger. A whole U-Net in bfloat16 is 1.4 % off either way.
    """
    B, heads, N, d = q.shape
    M = k.shape[2]
    q, k, v = (x.reshape(B * heads, -1, d) for x in (q, k, v))
    bound = q.float().norm(dim=-1).amax() * k.float().norm(dim=-1).amax() * (d**-0.5 * math.log2(math.e))
    largest = torch.stack(torch.aminmax(v)).abs().amax().float().clamp(min=1)
    # not so if it is not a number
    small = bool((bound < LARGEST_EXPONENT) & (bound + torch.log2(M * largest) < LARGEST_SUM))
    q = q * (d**-0.5 * (math.log2(math.e) if small else 1.0))
    sums = v.new_zeros(B * heads, M, (d // LANES + 1) * LANES)  # v, a column of ones, zeros
    sums[..., :d], sums[..., d] = v, 1
    least, most = THREADS
    at_a_time = SCORES * min(max(torch.get_num_threads(), least), most)
    rows = min(N, max(ROWS[q.dtype], at_a_time // M))
    group = max(1, min(B * heads, at_a_time // (rows * M))) if q.dtype == torch.bfloat16 else 1
    out = q.new_empty(B * heads, N, sums.shape[-1])
    for i in range(0, B * heads, group):
        times_keys, times_values = _times(k[i : i + group].transpose(1, 2)), _times(sums[i : i + group])
        for j in range(0, N, rows):
            scores = times_keys(q[i : i + group, j : j + rows])
            weights = scores.exp2_() if small else torch.softmax(scores, dim=-1, out=scores)
            out[i : i + group, j : j + rows] = times_values(weights)
    x = out[..., :d] / out[..., d : d + 1]
    return x.view(B, heads, N, d)


def _times(matrices: Tensor) -> Callable[[Tensor], Tensor]:
    """The function x (g, n, a) -> x @ matrices (g, a, b); in float32 through oneDNN, for g = 1, as bmm takes MKL."""
    if matrices.dtype != torch.float32:
        return lambda x: torch.bmm(x, matrices)
    weight = _linear_weight(matrices[0].t().contiguous())
    return lambda x: _linear(x[0], weight, None).unsqueeze(0)


class GroupNorm(nn.GroupNorm):
    """Wu and He 2018, "Group normalization", on CPUs with exact sums in large float32 maps, faster in small bfloat16.

    PyTorch's kernel for channels-last tensors there adds up all pixels one after the other in float32. In a picture of
    512x512 with a flat half that is an error of 2e-3 in the output; parts added up in float64 leave 4e-7. (Far
    from zero digits are lost all the same: 5e-3 where the mean is a thousand deviations, as in no network.)

    In bfloat16 maps of fewer pixels than `LARGE` take it four to six times as long as in float32.
    """

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, H, W)."""
        B, C, H, W = x.shape
        usual = torch.is_grad_enabled() or x.device.type != "cpu" or x.dtype != self.weight.dtype or _watched(x)
        if usual or not x.is_contiguous(memory_format=torch.channels_last):
            return super().forward(x)
        if x.dtype == torch.bfloat16 and H * W < LARGE:
            weight, bias = self.weight.float(), self.bias.float()
            return F.group_norm(x.float(), self.num_groups, weight, bias, self.eps).to(x.dtype)
        if x.dtype != torch.float32 or H * W < LARGE:
            return super().forward(x)
        sums, squares = _sums(x)
        n, G = H * W * C // self.num_groups, self.num_groups
        mean = sums.view(B, G, -1).sum(dim=-1, keepdim=True) / n
        var = squares.view(B, G, -1).sum(dim=-1, keepdim=True) / n - mean**2
        scale = (var.clamp(min=0) + self.eps).rsqrt() * self.weight.view(G, -1)
        shift = self.bias.view(G, -1) - mean * scale
        return torch.addcmul(shift.float().view(B, C, 1, 1), x, scale.float().view(B, C, 1, 1))


def moments(x: Tensor) -> tuple[Tensor, Tensor]:
    """Mean and mean square of each channel of x (B, C, H, W): (B, C) in float64 on the CPU.

    On the CPU `var_mean` would take longer than the convolution that follows: 26 times as long as adding up by parts.
    """
    if x.device.type == "cpu":
        sums, squares = _sums(x)
        return sums / x[0, 0].numel(), squares / x[0, 0].numel()
    var, mean = (y.cpu().double() for y in torch.var_mean(x.float(), dim=(2, 3), correction=0))
    return mean, var + mean**2


def _sums(x: Tensor) -> tuple[Tensor, Tensor]:
    """The sums of x (B, C, H, W) and of its squares over all pixels, (B, C), added up in float64 by parts."""
    B, C, H, W = x.shape
    pixels = x.permute(0, 2, 3, 1).reshape(B, H * W, C)  # a view where x is channels-last
    sums, squares = pixels.new_zeros(2, B, C, dtype=torch.float64)
    for part in pixels.split(max(PART // (B * C), 1), dim=1):
        part = part.float()
        sums += part.sum(dim=1)
        squares += (part * part).sum(dim=1)
    return sums, squares
