#!/usr/bin/env python3
r"""PyTorch and TRL as a process that a benchmark drives: one JSON request a line on stdin, one JSON answer a line.

    pip install torch trl peft transformers
    printf '%s\n' '{"op":"info"}' '{"op":"setup","workload":"token_logprobs_fwd"}' \
        '{"op":"rep"}' '{"op":"peak"}' '{"op":"teardown"}' | python3 benchmarks/peers/peer.py

A process of its own, so that the benchmark can alternate one repetition of ours with one of the peer's: on a shared
machine two blocks of timings taken minutes apart differ by more than the effect being measured.

Requests:
    {"op":"info"}                                     versions, threads, CPU
    {"op":"setup","workload":NAME,"threads":2,...}    allocates seeded inputs and warms up ("warmup", default 2 runs);
                                                      "allocator":"keep" lets malloc hold on to freed memory
    {"op":"rep"}                                      runs once        -> {"seconds": s}
    {"op":"peak"}                                     -> {"peak_bytes": b}; Linux only, takes seconds: see below
    {"op":"teardown"}                                 frees the inputs
A request that fails answers {"error": text} and the process goes on.

peak_bytes is the largest resident set during the run above the one just before it, so inputs do not count while
temporaries, outputs and gradients do. It is measured in a child process with the same set-up.

Timings include allocating outputs and gradients, as in a training step. Large gradients then cost a page fault for
every 4 KiB, often more than the arithmetic: compare kernels that write into memory of their caller's with
"allocator":"keep".

Workloads and their parameters (defaults in brackets); logits are (batch, length, vocab), dtype is "f32" or "bf16":
    token_logprobs_fwd            batch [8] length [128] vocab [32000] dtype [f32]     TRL selective_log_softmax
    token_logprobs_entropy_fwd    same                                                 + TRL entropy_from_logits
    token_logprobs_fwd_bwd        same, entropy [false]                                autograd with random upstream
    grpo_loss_from_logits         same, ref [true], epsilon [0.2], beta [0.04],
                                  variant [eager] | compile | compile_naive            loss and gradient to the logits
    linear_logprobs               rows [512] hidden [1024] vocab dtype,
                                  variant [eager] | chunked | compile                  gradients to hidden and weight
    policy_loss                   batch [4096] length [1024], any GRPOConfig option    GRPOTrainer._compute_loss
    group_advantages              groups [131072] size [8] scale_rewards [group]
    matmul                        rows [512] hidden [1024] vocab [151936] dtype        (rows, hidden) x (hidden, vocab)
    read_once                     batch length vocab dtype                             sum: the memory-bandwidth floor
"""

import ctypes
import gc
import json
import os
import subprocess
import sys
import time
import traceback

# Libraries print to stdout now and then; the protocol owns it, so file descriptor 1 is pointed at stderr for the rest.
answers = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)


class Unavailable(RuntimeError):
    pass


try:
    import torch
    import torch.nn.functional as F
    from trl.trainer.utils import entropy_from_logits, nanstd, selective_log_softmax
except ImportError as error:
    torch, import_error = None, error


DTYPES = {} if torch is None else {"f32": torch.float32, "bf16": torch.bfloat16}


# ---------------------------------------------------------------------------------------------------------------------
# Workloads: each takes the parameters and returns a function that does one repetition


def take(params, **defaults):
    values = {name: params.get(name, default) for name, default in defaults.items()}
    if "dtype" in values:
        values["dtype"] = DTYPES[values["dtype"]]
    return list(values.values())


def random_logits(batch, length, vocab, dtype, requires_grad=False):
    # Filled a sequence at a time: a whole float32 copy of large bf16 logits would dominate the set-up's memory.
    logits = torch.empty(batch, length, vocab, dtype=dtype)
    for row in logits:
        row.copy_(torch.randn(length, vocab) * 2)
    return logits.requires_grad_(requires_grad), torch.randint(0, vocab, (batch, length))


def token_logprobs(params, entropy, backward):
    batch, length, vocab, dtype = take(params, batch=8, length=128, vocab=32000, dtype="f32")
    logits, index = random_logits(batch, length, vocab, dtype, backward)
    if not backward:

        def forward():
            with torch.no_grad():
                logps = selective_log_softmax(logits, index)
                return (logps, entropy_from_logits(logits)) if entropy else logps

        return forward
    upstream = [torch.randn(batch, length).to(dtype) for _ in range(2 if entropy else 1)]

    def forward_backward():
        logits.grad = None
        outputs = [selective_log_softmax(logits, index)]
        if entropy:
            outputs.append(entropy_from_logits(logits))
        torch.autograd.backward(outputs, upstream)

    return forward_backward


def grpo_loss_from_logits(params):
    batch, length, vocab, dtype, use_ref, epsilon, beta, variant = take(
        params, batch=8, length=128, vocab=32000, dtype="f32", ref=True, epsilon=0.2, beta=0.04, variant="eager"
    )
    logits, index = random_logits(batch, length, vocab, dtype, True)
    with torch.no_grad():
        near = selective_log_softmax(logits, index).float()
        old, ref = near + 0.2 * torch.randn(batch, length), near + 0.2 * torch.randn(batch, length)
    advantages = torch.randn(batch, 1)
    mask = (torch.arange(length) < torch.randint(length // 2, length + 1, (batch, 1))).float()

    def naive_logps(logits, index):
        return logits.log_softmax(-1).gather(-1, index.unsqueeze(-1)).squeeze(-1)

    # TRL's per-sequence loop unrolls under torch.compile; the plain formula is what Inductor fuses best.
    logps_of = naive_logps if variant == "compile_naive" else selective_log_softmax

    def loss_of(logits, index, old, ref, advantages, mask):
        logps = logps_of(logits, index)
        ratio = torch.exp(logps - old)
        clipped = torch.clamp(ratio, 1 - epsilon, 1 + epsilon)
        per_token = -torch.min(ratio * advantages, clipped * advantages)
        if use_ref:
            d = ref - logps
            per_token = per_token + beta * (torch.exp(d) - d - 1)
        return (per_token * mask).sum() / mask.sum().clamp(min=1.0)

    if variant.startswith("compile"):
        loss_of = torch.compile(loss_of, dynamic=False)

    def run():
        logits.grad = None
        loss_of(logits, index, old, ref, advantages, mask).backward()

    return run


def linear_logprobs(params):
    rows, hidden_size, vocab, dtype, variant, chunk = take(
        params, rows=512, hidden=1024, vocab=151936, dtype="f32", variant="eager", chunk=8192
    )
    hidden = torch.randn(rows, hidden_size).to(dtype).requires_grad_()
    weight = (torch.randn(vocab, hidden_size) * 0.03).to(dtype).requires_grad_()
    index = torch.randint(0, vocab, (rows,))
    upstream = torch.randn(rows)
    if variant == "chunked":
        from trl.trainer.utils import _ChunkedLogProbFunction

        def logps_of(hidden, weight):
            return _ChunkedLogProbFunction.apply(hidden, weight, None, index, 1.0, chunk, None, 1.0)[0]

    else:

        def logps_of(hidden, weight):
            # One sequence of `rows` tokens: TRL loops over the first dimension.
            return selective_log_softmax(F.linear(hidden, weight).unsqueeze(0), index.unsqueeze(0)).squeeze(0)

        upstream = upstream.to(dtype)
        if variant == "compile":
            logps_of = torch.compile(logps_of, dynamic=False)

    def run():
        hidden.grad = weight.grad = None
        logps_of(hidden, weight).backward(upstream)

    return run


def policy_loss(params):
    """TRL's own method with its metrics, on an instance made without __init__ (no model, no data)."""
    from collections import defaultdict
    from types import SimpleNamespace

    from trl import GRPOConfig, GRPOTrainer

    batch, length = take(params, batch=4096, length=1024)
    known = ("op", "workload", "threads", "warmup", "seed", "allocator", "batch", "length")
    options = {k: v for k, v in params.items() if k not in known}
    options.setdefault("loss_type", "dapo")
    options.setdefault("beta", 0.04)
    config = GRPOConfig(
        output_dir=".", use_cpu=True, bf16=False, report_to="none", per_device_train_batch_size=batch,
        num_generations=batch, **options,
    )
    trainer = object.__new__(GRPOTrainer)
    trainer.args, trainer.model = config, SimpleNamespace(training=True)
    trainer.accelerator = SimpleNamespace(
        num_processes=1, sync_gradients=True, gather=lambda t: t, reduce=lambda t, reduction: t,
        pad_across_processes=lambda t, dim, pad_index: t,
    )
    trainer.current_gradient_accumulation_steps = 1
    for name in (
        "loss_type", "importance_sampling_level", "top_entropy_quantile", "off_policy_mask_threshold", "beta",
        "use_vllm", "max_completion_length", "entropy_coef", "use_adaptive_entropy",
    ):
        setattr(trainer, name, getattr(config, name))
    trainer.epsilon_low = config.epsilon
    trainer.epsilon_high = config.epsilon if config.epsilon_high is None else config.epsilon_high
    trainer._entropy_bonus_enabled = config.entropy_coef != 0.0
    trainer.vllm_importance_sampling_correction = False
    trainer.aux_loss_enabled = False

    logps = (-torch.rand(batch, length) * 4).requires_grad_()
    entropies = torch.rand(batch, length) * 3
    mask = (torch.arange(length) < torch.randint(length // 2, length + 1, (batch, 1))).long()
    # The method joins prompt and completion ids for the model, which is stubbed; on the meta device that costs nothing.
    meta = torch.empty(batch, length, dtype=torch.long, device="meta")
    inputs = {
        "prompt_ids": meta[:, :0], "prompt_mask": mask[:, :0], "completion_ids": meta, "completion_mask": mask,
        "advantages": torch.randn(batch), "num_items_in_batch": mask.sum(),
        "old_per_token_logps": logps.detach() + 0.2 * torch.randn(batch, length),
        "ref_per_token_logps": logps.detach() + 0.2 * torch.randn(batch, length),
    }
    trainer._get_per_token_logps_and_entropies = lambda *args, **kwargs: (logps, entropies, None)

    def run():
        logps.grad = None
        trainer._metrics = {"train": defaultdict(list)}
        trainer._compute_loss(trainer.model, inputs).backward()

    return run


def group_advantages(params):
    groups, size, scale = take(params, groups=131072, size=8, scale_rewards="group")
    rewards_per_func = torch.randn(groups * size, 1)
    weights = torch.ones(1)

    def run():
        # The sequence of tensor operations that TRL performs between rewards and advantages, logged values included.
        missing = torch.isnan(rewards_per_func).all(dim=1)
        rewards = (rewards_per_func * weights.unsqueeze(0)).nansum(dim=1)
        rewards[missing] = torch.nan
        grouped = rewards.view(-1, size)
        mean = torch.nanmean(grouped, dim=1).repeat_interleave(size, dim=0)
        if scale == "batch":
            std = nanstd(rewards).expand_as(rewards)
        else:
            std = nanstd(grouped, dim=1).repeat_interleave(size, dim=0)
        advantages = rewards - mean
        if scale != "none":
            advantages = advantages / (std + 1e-4)
        advantages = torch.nan_to_num(advantages, nan=0.0)
        zero_std = torch.isclose(std, torch.zeros_like(std))
        logged = torch.nanmean(rewards).item(), nanstd(rewards).item(), zero_std.float().mean().item()
        return advantages, logged

    return run


def matmul(params):
    rows, hidden_size, vocab, dtype = take(params, rows=512, hidden=1024, vocab=151936, dtype="f32")
    hidden, weight = torch.randn(rows, hidden_size).to(dtype), torch.randn(vocab, hidden_size).to(dtype)
    out = torch.empty(rows, vocab, dtype=dtype)  # preallocated: page faults are not part of the arithmetic
    return lambda: torch.mm(hidden, weight.t(), out=out)


def read_once(params):
    batch, length, vocab, dtype = take(params, batch=8, length=128, vocab=32000, dtype="f32")
    logits, _ = random_logits(batch, length, vocab, dtype)
    # Two bf16 values read as one float32 are finite (the upper half is a normal number); the sum means nothing, but it
    # reads every byte without the cost of converting.
    flat = logits.view(-1).view(torch.float32)
    return lambda: flat.sum()


WORKLOADS = {
    "token_logprobs_fwd": lambda p: token_logprobs(p, entropy=False, backward=False),
    "token_logprobs_entropy_fwd": lambda p: token_logprobs(p, entropy=True, backward=False),
    "token_logprobs_fwd_bwd": lambda p: token_logprobs(p, entropy=p.get("entropy", False), backward=True),
    "grpo_loss_from_logits": grpo_loss_from_logits,
    "linear_logprobs": linear_logprobs,
    "policy_loss": policy_loss,
    "group_advantages": group_advantages,
    "matmul": matmul,
    "read_once": read_once,
}


# ---------------------------------------------------------------------------------------------------------------------
# Memory


def status_bytes(field):
    with open("/proc/self/status") as status:
        for line in status:
            if line.startswith(field + ":"):
                return int(line.split()[1]) * 1024
    raise Unavailable(f"/proc/self/status has no {field}")


def measure_peak(run):
    gc.collect()
    libc = ctypes.CDLL(None)
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)
    with open("/proc/self/clear_refs", "w") as clear:
        clear.write("5")  # VmHWM := VmRSS
    before = status_bytes("VmRSS")
    run()
    return {"peak_bytes": status_bytes("VmHWM") - before, "inputs_resident_bytes": before}


def measure_peak_apart(setup):
    """The same in a fresh process whose malloc maps every large block on its own. In a heap that earlier runs have
    left holes in, one and the same run reads anything from its true peak to several times that."""
    if not sys.platform.startswith("linux"):
        raise Unavailable("peak memory is read from /proc, which only Linux has")
    requests = [{**setup, "op": "setup", "warmup": 1, "allocator": "inherited"}, {"op": "peak", "here": True}]
    child = subprocess.run(
        [sys.executable, __file__], input="".join(json.dumps(r) + "\n" for r in requests), text=True,
        stdout=subprocess.PIPE, env={**os.environ, "MALLOC_MMAP_THRESHOLD_": str(1 << 20)},
    )
    return json.loads(child.stdout.splitlines()[-1])


# glibc's names for mallopt(3).
M_TRIM_THRESHOLD, M_MMAP_THRESHOLD, M_MMAP_MAX = -1, -3, -4


def set_allocator(kind):
    """"default" is where glibc's moving thresholds settle; "keep" never gives memory back, so that temporaries and
    gradients cost page faults in the first repetition only: the peer at its best."""
    if kind == "inherited" or not sys.platform.startswith("linux"):
        return
    libc, keep = ctypes.CDLL(None), kind == "keep"
    if not hasattr(libc, "mallopt"):  # musl
        return
    libc.mallopt(M_MMAP_THRESHOLD, 32 << 20)
    libc.mallopt(M_MMAP_MAX, 0 if keep else 65536)
    libc.mallopt(M_TRIM_THRESHOLD, -1 if keep else 64 << 20)


# ---------------------------------------------------------------------------------------------------------------------
# The loop


def cpu_model():
    try:
        with open("/proc/cpuinfo") as cpuinfo:
            return next((line.split(":", 1)[1].strip() for line in cpuinfo if line.startswith("model name")), None)
    except OSError:
        return None


class Peer:
    run = None

    def info(self, _):
        import transformers
        import trl

        return {
            "python": sys.version.split()[0],
            "torch": torch.__version__,
            "trl": trl.__version__,
            "transformers": transformers.__version__,
            "threads": torch.get_num_threads(),
            "cpus": os.cpu_count(),
            "cpu_model": cpu_model(),
            "cpu_capability": torch.backends.cpu.get_cpu_capability(),
            "mkldnn": torch.backends.mkldnn.is_available(),
            "mkldnn_bf16": bool(torch.ops.mkldnn._is_mkldnn_bf16_supported()),
            "workloads": sorted(WORKLOADS),
        }

    def setup(self, request):
        self.teardown(request)
        torch.set_num_threads(request.get("threads", 2))
        torch.manual_seed(request.get("seed", 0))
        set_allocator(request.get("allocator", "default"))
        self.setup_request = request
        self.run = WORKLOADS[request["workload"]](request)
        start = time.perf_counter()
        for _ in range(request.get("warmup", 2)):
            self.run()
        return {"ready": True, "warmup_seconds": time.perf_counter() - start, "threads": torch.get_num_threads()}

    def rep(self, _):
        # Held until the clock is read: freeing the outputs is not part of the operation.
        start = time.perf_counter()
        result = self.ready()()
        seconds = time.perf_counter() - start
        del result
        return {"seconds": seconds}

    def peak(self, request):
        run = self.ready()
        if not request.get("here"):
            return measure_peak_apart(self.setup_request)
        # A gradient left by the warm-up would count as resident before the run and be reused during it.
        for cell in run.__closure__ or ():
            if isinstance(cell.cell_contents, torch.Tensor):
                cell.cell_contents.grad = None
        return measure_peak(run)

    def teardown(self, _):
        self.run = None
        gc.collect()
        return {"done": True}

    def ready(self):
        if self.run is None:
            raise Unavailable('no workload: send {"op":"setup",...} first')
        return self.run


def main():
    peer = Peer()
    for line in sys.stdin:
        if not line.strip():
            continue
        try:
            if torch is None:
                raise Unavailable(f"PyTorch or TRL cannot be imported: {import_error}")
            request = json.loads(line)
            op = request.get("op")
            if op not in ("info", "setup", "rep", "peak", "teardown"):
                raise ValueError(f"unknown op {op!r}")
            answer = getattr(peer, op)(request)
        except Exception as error:  # the runner decides what a failed request means; the process must outlive it
            traceback.print_exc(file=sys.stderr)
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


if __name__ == "__main__":
    main()
