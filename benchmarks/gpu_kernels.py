"""Times the GPU kernels and a whole decode step by CUDA graph replay, and prints tables.

    python benchmarks/gpu_kernels.py [attention] [linear] [step] [--json FILE]

Bytes are those that must be read: keys and values, or weights. Each graph goes over enough
distinct data that nothing is found in the L2 cache by luck.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F

from nanovllm.attention.base import AttentionBatch
from nanovllm.attention.triton import TritonAttention
from nanovllm.kernels.gpu import attention, linear, sampling
from nanovllm.layers.ops import TorchOps
from nanovllm.models import registry
from nanovllm.models.decoder import Decoder
from nanovllm.runner.gpu_forward import GpuForward
from nanovllm.runner.loader import fill_dummy_weights

CUDA = torch.device("cuda")
BF16 = torch.bfloat16
SHAPES = {  # name: hidden, intermediate, layers, heads, KV heads, tied
    "0.6B": (1024, 3072, 28, 16, 8, True),
    "8B": (4096, 12288, 36, 32, 8, False),
}
VOCAB = 151936
RESULTS: list[dict[str, object]] = []


def graph_time(run, count: int) -> float:
    """Microseconds of one of the `count` equal pieces of run(), by graph replay; median of 5."""
    run()
    torch.cuda.synchronize()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        run()
    graph.replay()
    times = []
    for _ in range(5):
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(3):
            graph.replay()
        end.record()
        end.synchronize()
        times.append(start.elapsed_time(end) * 1000 / 3 / count)
    return statistics.median(times)


def report(table: str, micros: float, num_bytes: float, **what: object) -> None:
    rate = num_bytes / micros / 1e6
    RESULTS.append({"table": table, "us": micros, "tb_per_s": rate, **what})
    words = "  ".join(f"{k}={v}" for k, v in what.items())
    print(f"{table:9s} {micros:9.2f} us {rate:6.2f} TB/s  {words}", flush=True)


def tried(call, *args, **kwargs):
    """None where a variant does not compile or fit."""
    try:
        return call(*args, **kwargs)
    except Exception as error:
        print(f"          {type(error).__name__}: {str(error)[:100]}", kwargs)
        return None


def fake_batch(num_seqs: int, slots: int, mean: int, num_blocks: int):
    """Rows of mixed lengths around `mean` with scattered blocks, and their total of keys."""
    generator = torch.Generator().manual_seed(0)
    lens = torch.randint(mean // 2, mean * 3 // 2, (num_seqs,), generator=generator)
    columns = -(-int(lens.max()) // slots)
    tables = torch.randperm(num_blocks, generator=generator)[: num_seqs * columns]
    tables = tables.view(num_seqs, columns).int().to(CUDA)
    ones = torch.arange(num_seqs + 1, dtype=torch.int32, device=CUDA)
    batch = AttentionBatch(
        ones, lens.int().to(CUDA), tables, torch.zeros(num_seqs, dtype=torch.int64, device=CUDA),
        (lens - 1).to(CUDA), 1, int(lens.max()),
    )  # fmt: skip
    return batch, int(lens.sum())


def bench_attention(heads: int, groups: int, num_seqs: int, slots: int, variants) -> None:
    dim, mean = 128, 900
    layers = max(2, min(28, 4000 // num_seqs))
    num_blocks = num_seqs * -(-mean * 3 // 2 // slots) + 8
    cache = torch.randn(layers, num_blocks, 2, groups, slots, dim, dtype=BF16, device=CUDA)
    batch, keys = fake_batch(num_seqs, slots, mean, num_blocks)
    q = torch.randn(num_seqs, heads, dim, dtype=BF16, device=CUDA)
    out = torch.empty_like(q)
    workspace = attention.DecodeWorkspace(heads, dim, CUDA)
    for tile, splits in variants:
        if splits is None:
            splits = attention.num_splits(num_seqs, groups, batch.max_context_len)
        if splits > 1 and splits * num_seqs > attention.MAX_SPLIT_PROGRAMS:
            continue

        def run(tile=tile, splits=splits):
            for layer in range(layers):
                attention.decode(
                    q, cache[layer], batch.cu_q_lens, batch.context_lens, batch.block_tables,
                    0.1, None, workspace, splits, out, tile=tile,
                )  # fmt: skip

        micros = tried(graph_time, run, layers)
        if micros:
            report("attention", micros, keys * groups * dim * 4, H=heads, G=groups, S=num_seqs,
                   P=slots, tile=tile, splits=splits)  # fmt: skip


def all_attention() -> None:
    tiles = [(64, 4, 3), (64, 4, 4), (64, 4, 5), (32, 4, 4), (32, 2, 5), (128, 4, 3), (128, 8, 4)]
    for slots in (16, 32, 64):
        bench_attention(16, 8, 256, slots, [(t, 1) for t in tiles])
    for num_seqs in (128, 64, 32, 8, 1):
        splits = sorted({1, 2, 4, 8, 16} if num_seqs <= 32 else {1, 2, 4})
        bench_attention(16, 8, num_seqs, 32, [((64, 4, 4), s) for s in splits])
    bench_attention(32, 8, 256, 32, [(t, 1) for t in tiles])
    bench_attention(32, 8, 64, 32, [((64, 4, 4), s) for s in (1, 2)])
    bench_prefill()


def bench_prefill() -> None:
    heads, groups, dim, slots, length, rows = 16, 8, 128, 32, 2048, 4
    tables = torch.arange(rows * 64, device=CUDA).view(rows, 64).int()
    cu = torch.arange(0, rows * length + 1, length, device=CUDA).int()
    context = torch.full((rows,), length, device=CUDA).int()
    cache = torch.randn(rows * 64, 2, groups, slots, dim, dtype=BF16, device=CUDA)
    q = torch.randn(rows * length, heads, dim, dtype=BF16, device=CUDA)
    out = torch.empty_like(q)
    tiles = ((32, 64, 4, 3), (64, 64, 4, 3), (64, 128, 8, 3), (32, 128, 4, 3), (64, 64, 4, 2))
    for tile in tiles:

        def run(tile=tile):
            attention.prefill(q, cache, cu, context, tables, 0.1, None, out, skip_single=True,
                              tile=tile)  # fmt: skip

        micros = tried(graph_time, run, 1)
        if micros:
            flops = 2 * rows * heads * length * length * dim
            print(f"prefill   {micros:9.2f} us {flops / micros / 1e6:6.1f} TFLOP/s  tile={tile}")
            RESULTS.append({"table": "prefill", "us": micros, "tile": tile})


def bench_linear(m: int, n: int, k: int, options, variants) -> None:
    gated = options.get("gated", False)
    total = n * (2 if gated else 1)
    copies = max(2, min(28, (200 << 20) // (total * k * 2)))
    weights = [torch.randn(total, k, dtype=BF16, device=CUDA) * 0.02 for _ in range(copies)]
    x = torch.randn(m, k, dtype=BF16, device=CUDA)
    out = torch.randn(m, n, dtype=BF16, device=CUDA)
    norm = torch.ones(k, dtype=BF16, device=CUDA) if options.get("norm") else None
    residual = out if options.get("residual") else None
    name = {"M": m, "N": total, "K": k}

    def library():
        for w in weights:
            F.linear(x, w)

    report("linear", graph_time(library, copies), total * k * 2, **name, by="cuBLAS")
    for tile in variants:

        def run(tile=tile):
            for w in weights:
                linear.linear(x, w, out, norm=norm, eps=1e-6, gated=gated, residual=residual,
                              pdl=True, tile=tile)  # fmt: skip

        micros = tried(graph_time, run, copies)
        if micros:
            report("linear", micros, total * k * 2, **name, tile=tile)


def all_linear() -> None:
    for hidden, inter, _, heads, groups, _ in SHAPES.values():
        products = [
            ((heads + 2 * groups) * 128, hidden, {"norm": True}),
            (hidden, heads * 128, {"residual": True}),
            (inter, hidden, {"norm": True, "gated": True}),
            (hidden, inter, {"residual": True}),
        ]
        for n, k, options in products:
            pad = 1 << (k - 1).bit_length()
            gemv = [
                (max(1, e // pad // (2 if options.get("gated") else 1)), w)
                for e, w in ((8192, 4), (16384, 8), (16384, 4), (32768, 8))
            ]
            bench_linear(1, n, k, options, dict.fromkeys(gemv))
            for m in (2, 4, 8):
                bench_linear(m, n, k, options, dict.fromkeys(gemv))


def make_model(name: str, attend: TritonAttention) -> Decoder:
    hidden, inter, layers, heads, groups, tied = SHAPES[name]
    config = registry.read_config({
        "architectures": ["Qwen3ForCausalLM"], "vocab_size": VOCAB, "hidden_size": hidden,
        "intermediate_size": inter, "num_hidden_layers": layers, "num_attention_heads": heads,
        "num_key_value_heads": groups, "head_dim": 128, "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": tied,
    })  # fmt: skip
    model = Decoder(config, TorchOps(), attend)
    fill_dummy_weights(model, BF16, CUDA, 0)
    model.finish_loading(CUDA, 4096)
    return model


def bench_step(name: str) -> None:
    attend = TritonAttention()
    start = time.time()
    model = make_model(name, attend)
    torch.cuda.synchronize()
    print(f"{name}: weights made in {time.time() - start:.1f} s")
    c, slots = model.config, 32
    num_blocks = 256 * 48
    cache = torch.zeros(c.num_layers, num_blocks, 2, c.num_kv_heads, slots, 128, dtype=BF16,
                        device=CUDA)  # fmt: skip
    cache.normal_()
    weights = (
        sum(
            w.numel()
            for b in model.blocks
            for w in (b.qkv.params[0], b.o.params[0], b.gate_up.params[0], b.down.params[0])
        )
        * 2
    )
    weights += model.lm_head.numel() * 2
    for num_seqs in (1, 2, 4, 8, 32, 64, 128, 256):
        batch, keys = fake_batch(num_seqs, slots, 900, num_blocks)
        ids = torch.randint(0, VOCAB, (num_seqs,), device=CUDA)
        row_floats = torch.ones(num_seqs, device=CUDA)
        row_ints = torch.zeros(num_seqs, dtype=torch.int32, device=CUDA)
        params = sampling.RowParams(row_floats, row_ints.long(), row_ints, row_ints, row_floats,
                                    row_floats * 0)  # fmt: skip
        workspace = sampling.Workspace(num_seqs, VOCAB, CUDA)
        failed = torch.zeros(num_seqs, dtype=torch.bool, device=CUDA)
        for pdl in (False, True):
            forward = GpuForward(model, attend, pdl=pdl)

            def run(
                forward=forward,
                ids=ids,
                batch=batch,
                params=params,
                workspace=workspace,
                failed=failed,
            ):
                logits = forward.logits(forward.hidden(ids, batch, cache))
                sampling.choose(logits, params, workspace, ids, failed, restricted=False)

            with torch.inference_mode():
                micros = tried(graph_time, run, 1)
            if micros:
                kv = keys * c.num_layers * c.num_kv_heads * 128 * 4
                report("step", micros, weights + kv, model=name, M=num_seqs, pdl=pdl,
                       tok_s=round(num_seqs * 1e6 / micros))  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("parts", nargs="*", default=["attention", "linear", "step"])
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    parts = {"attention": all_attention, "linear": all_linear}
    for part in args.parts:
        if part == "step":
            for name in SHAPES:
                bench_step(name)
        else:
            parts[part]()
    if args.json:
        about = {"device": torch.cuda.get_device_name(), "torch": torch.__version__}
        args.json.write_text(json.dumps({**about, "results": RESULTS}, indent=1, default=str))


if __name__ == "__main__":
    main()
