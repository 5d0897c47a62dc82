"""The ops of libvlm_grpo inside PyTorch, through ctypes: a torch.autograd.Function on CPU tensors.

    python3 examples/embed_pytorch/main.py build/Release/libvlm_grpo.so

No build step and no copy: the library reads and writes the tensors' own memory. The script checks
values and gradients against PyTorch's autograd of the plain formula and prints the largest
differences and the times of both.
"""

import ctypes
import sys
import time

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
pointer = ctypes.c_void_p

# The parameter list of native/include/vlm_grpo/token_logprobs.h, in its order.
PARAMS = [
    ("rows", ctypes.c_int64),
    ("vocab", ctypes.c_int64),
    ("row_stride", ctypes.c_int64),
    ("ids_per_row", ctypes.c_int64),
    ("logits_dtype", ctypes.c_int32),
    ("ignore_index", ctypes.c_int32),
    ("temperature", ctypes.c_double),
    ("logit_scale", ctypes.c_double),
    ("softcap", ctypes.c_double),
]


class ForwardArgs(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t)] + [
        (name, pointer)
        for name in "logits ids row_temperature keep_mask logprobs entropy lse sum_p2".split()
    ] + PARAMS


class BackwardArgs(ctypes.Structure):
    _fields_ = [("struct_size", ctypes.c_size_t)] + [
        (name, pointer)
        for name in (
            "logits ids row_temperature keep_mask lse entropy "
            "grad_logprobs grad_entropy grad_lse dlogits"
        ).split()
    ] + PARAMS


class VlmGrpo:
    """The library and one context of it."""

    def __init__(self, path, threads=0):
        self.lib = ctypes.CDLL(path)
        self.lib.vlm_grpo_context_create.restype = pointer
        self.lib.vlm_grpo_context_error.restype = ctypes.c_char_p
        self.context = pointer(self.lib.vlm_grpo_context_create(threads))

    def call(self, name, args_class, **values):
        args = args_class()
        getattr(self.lib, f"vlm_grpo_{name}_init")(ctypes.byref(args))
        if args.struct_size != ctypes.sizeof(args_class):
            raise RuntimeError(f"{args_class.__name__} does not mirror the library's header")
        for key, value in values.items():
            setattr(args, key, value.data_ptr() if isinstance(value, torch.Tensor) else value)
        if getattr(self.lib, f"vlm_grpo_{name}")(self.context, ctypes.byref(args)) != 0:
            raise RuntimeError(self.lib.vlm_grpo_context_error(self.context).decode())


class TokenLogprobs(torch.autograd.Function):
    """(logits [N, V], ids [N]) -> log-probs [N] and entropy [N], both differentiable."""

    @staticmethod
    def forward(ctx, logits, ids, library, temperature):
        logits, ids = logits.contiguous(), ids.to(torch.int32).contiguous()
        rows, vocab = logits.shape
        logprobs, entropy, lse = (torch.empty(rows, dtype=torch.float32) for _ in range(3))
        ctx.common = dict(
            rows=rows, vocab=vocab, logits_dtype=DTYPES[logits.dtype], temperature=temperature
        )
        library.call(
            "token_logprobs", ForwardArgs, logits=logits, ids=ids,
            logprobs=logprobs, entropy=entropy, lse=lse, **ctx.common,
        )
        ctx.save_for_backward(logits, ids, lse, entropy)
        ctx.library = library
        return logprobs, entropy

    @staticmethod
    def backward(ctx, grad_logprobs, grad_entropy):
        logits, ids, lse, entropy = ctx.saved_tensors
        dlogits = torch.empty_like(logits)
        ctx.library.call(
            "token_logprobs_backward", BackwardArgs, logits=logits, ids=ids, lse=lse,
            entropy=entropy, grad_logprobs=grad_logprobs.contiguous(),
            grad_entropy=grad_entropy.contiguous(), dlogits=dlogits, **ctx.common,
        )
        return dlogits, None, None, None


def plain(logits, ids, temperature):
    z = logits.float() / temperature
    logp = torch.log_softmax(z, dim=-1)
    return logp.gather(-1, ids[:, None]).squeeze(-1), -(logp.exp() * logp).sum(-1)


def main():
    library = VlmGrpo(sys.argv[1], torch.get_num_threads())
    torch.manual_seed(0)
    rows, vocab, temperature = 256, 32000, 0.9
    data = torch.randn(rows, vocab) * 3
    ids = torch.randint(vocab, (rows,))
    upstream, upstream_entropy = torch.randn(rows), torch.randn(rows) * 0.01

    def run(function):
        logits = data.clone().requires_grad_()
        start = time.perf_counter()
        logprobs, entropy = function(logits)
        ((logprobs * upstream).sum() + (entropy * upstream_entropy).sum()).backward()
        return time.perf_counter() - start, logprobs.detach(), entropy.detach(), logits.grad

    ours = lambda logits: TokenLogprobs.apply(logits, ids, library, temperature)
    theirs = lambda logits: plain(logits, ids, temperature)
    run(ours), run(theirs)
    pairs = [(run(ours), run(theirs)) for _ in range(5)]
    median = lambda values: sorted(values)[len(values) // 2]
    mine, reference = pairs[0]
    worst = 0.0
    for name, a, b in zip(("log-probs", "entropy", "dlogits"), mine[1:], reference[1:]):
        error = ((a - b).abs() / (1 + b.abs())).max().item()
        worst = max(worst, error)
        print(f"{name}: largest difference {error:.1e}")
    ratio = median([b[0] for _, b in pairs]) / median([a[0] for a, _ in pairs])
    print(f"forward + backward, {rows} x {vocab}: {ratio:.1f}x the speed of autograd")
    sys.exit(0 if worst < 1e-5 else 1)


if __name__ == "__main__":
    main()
