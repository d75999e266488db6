"""The benchmarks of ``k1.py bench``: one row each. Only the standard library is needed."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from kandinsky5.errors import UserError


@dataclass(frozen=True)
class BenchOption:
    """One option of a benchmark.

    Attributes:
        flag: as typed; without its dashes it is the function's keyword.
        help: one line.
        kind: ``int``, ``float``, ``str`` or ``bool`` (a switch).
    """

    flag: str
    help: str
    kind: type = int

    @property
    def keyword(self) -> str:
        return self.flag.removeprefix("--").replace("-", "_")


@dataclass(frozen=True)
class Bench:
    """A benchmark.

    Attributes:
        title: what it shows.
        target: its function, ``module:name``; it takes the options as keywords and gives a dictionary.
        options: those it understands.
    """

    title: str
    target: str
    options: tuple[BenchOption, ...] = ()

    def run(self, given: dict[str, Any]) -> dict[str, Any]:
        """Its numbers, JSON-ready.

        Raises:
            UserError: an option that cannot be used, or a machine that lacks what is measured.
        """
        module, _, name = self.target.partition(":")
        function: Callable[..., dict[str, Any]] = getattr(importlib.import_module(module), name)
        try:
            return function(**given)
        except (NotImplementedError, ValueError) as error:
            # Packages that know no UserError say "not here" and "not so" with these.
            raise UserError("bench", name, str(error)) from error


BENCHES: dict[str, Bench] = {
    "demo-adherence": Bench(
        "how often the built-in model paints the colour, direction and shape asked for",
        "kandinsky5.demo.bench:demo_adherence",
        (
            BenchOption("--pairs", "how many clips (60)"),
            BenchOption("--seed", "of the questions (20000)"),
            BenchOption("--steps", "of a clip (the preset's)"),
            BenchOption("--mode", "t2v or i2v (t2v)", str),
            BenchOption("--keep", "keep the clips in this folder", str),
            BenchOption("--weights", "format of the transformer's weights (auto)", str),
        ),
    ),
    "resume-kills": Bench(
        "runs killed at random moments and resumed, against one that was left alone",
        "kandinsky5.bench.resume_kills:resume_kills",
        (
            BenchOption("--kills", "how many (20)"),
            BenchOption("--mode", "t2v or i2v (t2v)", str),
            BenchOption("--cache", "none or magcache (none)", str),
            BenchOption("--steps", "of a run (the preset's)"),
            BenchOption("--seed", "of prompt, noise and moments (40000)"),
        ),
    ),
    "demo-preview": Bench(
        "how early the built-in model's live preview shows the colour asked for",
        "kandinsky5.demo.preview_bench:demo_preview",
        (
            BenchOption("--runs", "how many (60)"),
            BenchOption("--mode", "t2v or i2v (t2v)", str),
            BenchOption("--seed", "of the questions (20000)"),
            BenchOption("--steps", "of a run (the preset's)"),
            BenchOption("--shift", "of the schedule (the preset's)", float),
        ),
    ),
    "preview-cost": Bench(
        "what one picture of the live preview costs in time and bytes",
        "kandinsky5.bench.preview_cost:preview_cost",
        (
            BenchOption("--height", "of the video (512)"),
            BenchOption("--width", "likewise (768)"),
            BenchOption("--seconds", "of video (5)", float),
            BenchOption("--runs", "pictures of each kind (30)"),
            BenchOption("--seed", "of the scenes (0)"),
        ),
    ),
    "magcache-ratios": Bench(
        "how much longer what the built-in model's blocks add becomes from step to step",
        "kandinsky5.demo.magcache:magcache_ratios",
        (
            BenchOption("--mode", "t2v or i2v (t2v)", str),
            BenchOption("--pairs", "how many clips (8)"),
            BenchOption("--seed", "of the questions (90000)"),
        ),
    ),
    "magcache-demo": Bench(
        "what MagCache saves the built-in model, and what it costs in adherence",
        "kandinsky5.demo.magcache:magcache_demo",
        (
            BenchOption("--mode", "t2v or i2v (t2v)", str),
            BenchOption("--pairs", "clips each way (30)"),
            BenchOption("--seed", "of the questions (20000)"),
            BenchOption("--steps", "of a clip (the preset's)"),
        ),
    ),
    "activations": Bench(
        "memory that an evaluation of the transformer needs beside its weights, counted",
        "kandinsky5.model.bench:activations",
        (
            BenchOption("--tokens", "tokens per chunk (2048)"),
            BenchOption("--heads", "heads per group of self-attention (8)"),
        ),
    ),
    "nabla": Bench(
        "memory in which sparse attention chooses its blocks, counted, and whether it chooses the same",
        "kandinsky5.model.nabla_bench:nabla",
        (
            BenchOption("--heads", "of the case in which blocks are compared (4)"),
            BenchOption("--seed", "of that case (0)"),
        ),
    ),
    "warm-start": Bench(
        "how soon a worker begins its first and its second job",
        "kandinsky5.worker.bench:warm_start",
        (
            BenchOption("--preset", "one that makes a video from text (demo-t2v)", str),
            BenchOption("--steps", "of each job (the preset's)"),
        ),
    ),
    "convert": Bench(
        "how fast a checkpoint becomes int8, and in how much memory",
        "kandinsky5.conversion.bench:conversion",
        (
            BenchOption("--blocks", "visual blocks in Lite's shapes (2); 32 are 4 GB"),
            BenchOption("--folder", "where there is room for two such files", str),
        ),
    ),
    "stream-bytes": Bench(
        "what a block weighs and what a guided step moves, counted without weights",
        "kandinsky5.bench.stream_bytes:stream_bytes",
        (
            BenchOption("--slots", "buffers on the device (2)"),
            BenchOption("--resident", "blocks that stay on the device (0)"),
            BenchOption("--steps", "to run (3)"),
        ),
    ),
    "stream-sim": Bench(
        "whether computing waits for weights, with given times on a virtual clock",
        "kandinsky5.bench.stream_sim:stream_sim",
        (
            BenchOption("--slots", "buffers on the device (2)"),
            BenchOption("--resident", "blocks that stay on the device (0)"),
            BenchOption("--steps", "of each case (10)"),
            BenchOption("--schedules", "how many of random times (100)"),
            BenchOption("--seed", "of the random times (0)"),
            BenchOption("--compute-ms", "measured time of one block: adds a case", float),
            BenchOption("--link-gb-s", "rate of that case's link (25)", float),
            BenchOption("--disk-gb-s", "rate of that case's disk (none)", float),
        ),
    ),
    "stream": Bench(
        "streamed against resident and against swapping by eviction; needs a GPU",
        "kandinsky5.bench.stream:stream",
        (
            BenchOption("--model", "pro, lite or image (pro)", str),
            BenchOption("--weights", "bf16 or int8 (bf16)", str),
            BenchOption("--size", "512x768x121 or 1024x1024x1 (512x768x121)", str),
            BenchOption("--blocks", "how many of the model's (all)"),
            BenchOption("--slots", "buffers on the device (2)"),
            BenchOption("--steps", "timed (2)"),
        ),
    ),
    "plan-peaks": Bench(
        "device memory that plans predict against what is allocated, counted without a device",
        "kandinsky5.bench.plan_peaks:plan_peaks",
        (BenchOption("--case", "one of its jobs (all)", str),),
    ),
    "whole-run": Bench(
        "a whole job with random weights in the true shapes, under a memory cap; needs a GPU, or the demo",
        "kandinsky5.bench.whole_run:whole_run",
        (
            BenchOption("--preset", "as for generate (pro-t2v-5s-sd)", str),
            BenchOption("--weights", "of the transformer: int8 or bf16 (int8)", str),
            BenchOption("--vram", "GB the job may take (all)", float),
            BenchOption("--ram", "GB of main memory it may take (what is free)", float),
            BenchOption("--seconds", "of video (the preset's)", float),
            BenchOption("--steps", "of the schedule (the preset's)"),
            BenchOption("--cache", "none or magcache (none)", str),
            BenchOption("--text", "random text encoders, or given embeddings (random)", str),
            BenchOption("--compare", "resident: again without a cap", str),
            BenchOption("--folder", "where there is room for the files", str),
        ),
    ),
    "int8-demo": Bench(
        "what int8 weights cost in quality: adherence, latents, a block in Pro's shapes",
        "kandinsky5.bench.int8_demo:int8_demo",
        (
            BenchOption("--pairs", "how many clips of each (60)"),
            BenchOption("--seed", "of the questions (20000)"),
            BenchOption("--steps", "of a clip (the preset's)"),
            BenchOption("--mode", "t2v or i2v (t2v)", str),
        ),
    ),
    "pro-evaluation": Bench(
        "seconds and device memory of whole evaluations, random weights; needs a GPU",
        "kandinsky5.bench.pro_evaluation:pro_evaluation",
        (
            BenchOption("--model", "pro, lite or image (pro)", str),
            BenchOption("--weights", "bf16 or int8 (bf16)", str),
            BenchOption("--size", "HEIGHTxWIDTHxFRAMES, such as 1024x1024x241 (512x768x121)", str),
            BenchOption("--way", "resident, streamed or both (both)", str),
            BenchOption("--branches", "2 for a guided step, of which B6 speaks (1)"),
            BenchOption("--steps", "timed (2)"),
            BenchOption("--tokens", "tokens per chunk (4096)"),
            BenchOption("--heads", "heads per group of self-attention (all)"),
            BenchOption("--cap-gb", "most device memory allowed (all)", float),
        ),
    ),
    "pro-forward": Bench(
        "Pro in its true shapes on the CPU, int8 weights streamed from a file of 21 GB made for it",
        "kandinsky5.bench.pro_forward:pro_forward",
        (
            BenchOption("--model", "another member of the family: lite or image (pro)", str),
            BenchOption("--blocks", "visual blocks (all); fewer make a smaller file"),
            BenchOption("--text-blocks", "text blocks (all)"),
            BenchOption("--tokens", "visual tokens, a multiple of 4 (4)"),
            BenchOption("--steps", "guided ones (2)"),
            BenchOption("--folder", "where there is room for the file", str),
        ),
    ),
    "decode-work": Bench(
        "work and memory of the VAE's decode with the published shapes, counted without weights",
        "kandinsky5.bench.decode_work:decode_work",
        (
            BenchOption("--height", "of the video of 121 frames whose work is counted (512)"),
            BenchOption("--width", "likewise (768)"),
        ),
    ),
    "int8-accuracy": Bench(
        "signal to noise of the int8 scheme, of the community's and of others",
        "kandinsky5.bench.int8_layers:accuracy",
        (
            BenchOption("--tokens", "rows of the input (128)"),
            BenchOption("--features", "channels of the input (4096)"),
            BenchOption("--outputs", "channels of the result (256)"),
            BenchOption("--seed", "of everything random (0)"),
        ),
    ),
    "int8": Bench(
        "int8 linear layers against bf16 and another program's kernels, Pro's four shapes; needs a GPU",
        "kandinsky5.bench.int8_layers:int8_layers",
        (
            BenchOption("--tokens", "rows of the input (47616)"),
            BenchOption("--repetitions", "timed runs of each, their median counts (20)"),
        ),
    ),
}
