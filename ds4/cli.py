"""The ``ds4`` command: parse, call, print.

Nothing heavy is imported here: torch and the engine come in when a command needs them, after its options are checked,
so that help, the version and a mistyped option answer at once.
"""

from __future__ import annotations

import sys
from typing import Any

import click
from click.core import ParameterSource

from ds4 import __version__
from ds4.cli_bench import Mix, bench_command
from ds4.cli_bench import Wanted as Bench
from ds4.cli_common import (
    MEMORY,
    TOKENS,
    FiniteRange,
    Options,
    WholeRange,
    draft_options,
    model_options,
    sampling_options,
)
from ds4.cli_errors import OneLineErrors
from ds4.cli_throughput import Frontiers, Kinds, Throughput, throughput_command


def _print_version(context: click.Context, _parameter: click.Parameter, wanted: bool) -> None:
    """Callback of --version."""
    if not wanted or context.resilient_parsing:
        return
    click.echo(f"ds4 {__version__}")
    context.exit()


@click.group(
    cls=OneLineErrors,
    invoke_without_command=True,
    context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
)
@click.option(
    "--version", is_flag=True, is_eager=True, expose_value=False, callback=_print_version, help="Print the version."
)
@click.pass_context
def main(context: click.Context) -> None:
    """Run DeepSeek-V4-Flash on one GPU, or a small model of the same architecture on a CPU.

    \b
    Example:
      ds4 generate "What is the capital of France? One word."
    """
    if context.invoked_subcommand is None:
        click.echo(context.get_help())


@main.command()
@click.argument("prompt", required=False)
@model_options
@draft_options
@sampling_options
@click.option("--raw", is_flag=True, help="Continue PROMPT as it is, without the chat format.")
@click.option("--session", metavar="FILE", help="Go on from the session in FILE, and keep it there afterwards.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object with text, token ids and statistics.")
def generate(prompt: str | None, raw: bool, session: str | None, as_json: bool, **options: Any) -> None:
    """Answer a prompt.

    PROMPT is read from standard input if it is left out or is "-"; one newline at its end is not part of the prompt.
    The text streams to standard output, statistics go to standard error. Ctrl-C stops the answer (exit code 130).

    With --session only the part of PROMPT is processed that is not in FILE yet; "cached" in the statistics says how
    much was. PROMPT has to begin with all of its tokens, but for the last 8 at most; else FILE starts anew.

    With --draft a small head of the checkpoint guesses the next tokens and the model checks them in one step. At
    temperature 0 the text stays the same, token for token; above it the distribution does.

    \b
    Examples:
      ds4 generate "Tell me a short story about a robot learning to paint." -n 400
      ds4 generate -m model.gguf --temp 0.7 --top-p 0.95 --seed 1 < question.txt
      ds4 generate --raw --session tale.ds4 < tale.txt
      ds4 generate --draft 1 "Tell me a story about a lighthouse." --json
    """
    from ds4.cli_answer import generate_command

    chosen = Options(**options)
    if raw:
        for name, used in [("--system", chosen.system is not None), ("--think", chosen.think)]:
            if used:
                raise click.UsageError(f"--raw has no chat format, so {name} cannot be used with it")
    text = _read_prompt(prompt)
    generate_command(text, chosen, raw=raw, as_json=as_json, session=session)


def _read_prompt(prompt: str | None) -> str:
    """The prompt from the argument or from standard input, checked to be valid text and not empty."""
    if prompt is None or prompt == "-":
        if sys.stdin.isatty():
            raise click.UsageError("no prompt: give PROMPT, or pipe a text into standard input")
        try:
            prompt = sys.stdin.buffer.read().decode("utf-8")
        except UnicodeDecodeError as error:
            raise click.UsageError(f"standard input is not UTF-8 text (byte {error.start})") from None
        prompt = prompt.removesuffix("\n").removesuffix("\r")
    if any("\ud800" <= char <= "\udfff" for char in prompt):
        raise click.UsageError("PROMPT is not UTF-8 text")
    if not prompt:
        raise click.UsageError("the prompt is empty")
    return prompt


@main.command()
@model_options
@draft_options
@sampling_options
def chat(**options: Any) -> None:
    """Talk with the model.

    /help lists the commands of the conversation. Ctrl-C stops an answer, Ctrl-D quits.

    \b
    Example:
      ds4 chat --think --system "You answer in rhymes."
    """
    from ds4.cli_chat import Conversation
    from ds4.cli_common import load_llm

    chosen = Options(**options)
    chosen.sampling_params()
    Conversation(load_llm(chosen), chosen).run()


@main.command("inspect")
@click.argument("path", type=click.Path())
@click.option("--tensors", is_flag=True, help="List every tensor.")
@click.option("--draft", metavar="FILE", help="Attach a draft head from a file of its own.")
@click.option("--memory", type=MEMORY, metavar="SIZE", help="Does it fit, e.g. 128GiB? (this machine's memory)")
@click.option("--ctx", type=TOKENS, metavar="N", help="At which context, e.g. 1M (the model's own).")
@click.option("--verify", is_flag=True, help="Read all scales and tables and check them.")
@click.option("--read-speed", is_flag=True, help="Compare streaming the weights with a plain read of the files.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def inspect(context: click.Context, path: str, **wanted: Any) -> None:
    """Describe the checkpoint at PATH.

    Its generation and recipe, tensor types and sizes, layers, and the bytes read per token.

    PATH is a .gguf file, a .safetensors file, a directory with config.json and weights, or a name on the hub that is in
    the local cache. Only headers are read, but for --verify and --read-speed. The exit code is 1 if the model does not
    fit or --verify finds a defect.

    \b
    Examples:
      ds4 inspect model.gguf --tensors
      ds4 inspect model.gguf --memory 128GiB --ctx 1M
    """
    from ds4.cli_inspect import Wanted, inspect_command

    context.exit(inspect_command(path, Wanted(**wanted)))


# The formats are those of ds4.weights.recipes, which needs torch.
@main.command("convert")
@click.argument("source", metavar="IN")
@click.argument("out", metavar="OUT")
@click.option(
    "--experts",
    type=click.Choice(["nvfp4", "mxfp4", "q8_0", "bf16", "keep"]),
    default="keep",
    help="Format of the routed experts, of the trunk and of draft heads (keep).",
)
@click.option(
    "--dense",
    type=click.Choice(["q8_0", "bf16", "f16", "fp8", "keep"]),
    default="keep",
    help="Format of attention projections, indexer wq_b, shared experts, draft projections and, but for fp8, LM head "
    "(keep).",
)
@click.option("--shard-size", type=MEMORY, metavar="SIZE", help="Safetensors directory: largest file (5GB).")
@click.option("--force", is_flag=True, help="Replace OUT if it is a checkpoint already.")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def convert(source: str, out: str, **wanted: Any) -> None:
    """Convert the checkpoint IN to another container or other formats.

    OUT is x.gguf; or a directory, for safetensors in official naming; or x.safetensors, one such file with config.json
    beside it. It appears whole or not at all. Draft heads and the tokenizer come along.

    Values change only where a format is asked for that cannot hold them; the summary says what was rounded. With keep,
    a format that the other container does not have becomes one that loses nothing: in a GGUF, FP8 becomes BF16 (twice
    as large; --dense q8_0 is as small, but rounds); in safetensors, Q8_0, K-quants and the like become F32. GGUF has no
    fp8, safetensors no q8_0. Embedding, router, compressors, norms and hyper-connections keep their values always.

    \b
    Examples:
      ds4 convert DeepSeek-V4-Flash-0731 flash.gguf --dense q8_0
      ds4 convert flash.gguf flash-nvfp4 --experts nvfp4 --dense fp8
    """
    from ds4.cli_convert import Wanted, convert_command

    convert_command(source, out, Wanted(**wanted))


@main.command()
@click.option("-m", "--model", metavar="PATH", help="Checkpoint or hub name; the bundled small model if left out.")
@click.option("--ctx", type=Frontiers(), metavar="N,...", help="Lengths of the context to measure at, such as 2k,8k.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where to run (auto).")
@draft_options
@click.option(
    "--accept",
    type=FiniteRange(0, 1),
    metavar="X",
    help="Draft without a head: each token right with probability X, at no cost.",
)
@click.option("--prompts", type=Kinds(), metavar="KIND,...", help="Kinds of text: chat,code,random (all).")
@click.option("--tokens", type=WholeRange(1), default=64, metavar="N", help="Tokens decoded in a repeat (64).")
@click.option("--repeats", type=WholeRange(1), default=3, metavar="N", help="Repeats at each length (3).")
@click.option("--chunk", type=TOKENS, metavar="N", help="Prompt tokens timed at a time (4k; 512 on the CPU).")
@click.option("--synthetic", metavar="RECIPE", help="Random weights of a public checkpoint's formats, such as q2.")
@click.option("--layers", type=WholeRange(1), metavar="N", help="--synthetic: the first N layers (as many as fit).")
@click.option("--experts", type=WholeRange(1), metavar="N", help="--synthetic: experts a layer (256).")
@click.option("--skew", type=FiniteRange(0), default=0.0, metavar="X", help="--synthetic: uneven routing (0).")
@click.option(
    "--shrink",
    type=click.Choice(["1", "2", "4", "8"]),
    default="1",
    help="--synthetic: divide widths and vocabulary, for a look on a CPU (1).",
)
@click.option("--csv", metavar="FILE", help="Write the rows to FILE.")
@click.option("--plots", metavar="DIR", help="Draw plots into DIR, as PNG and SVG (pip install 'ds4[plots]').")
@click.option("--plan", is_flag=True, help="Launches and bytes of a decode step; needs no GPU.")
@click.option("--dispatch", is_flag=True, help="Which kernel serves which operation, and how often; needs no GPU.")
@click.option(
    "--profile",
    type=click.Choice(["step", "moe"]),
    is_flag=False,
    flag_value="step",
    help="Times on a GPU: of every operation (step), or of the experts by layer (moe).",
)
@click.option("--n-tok", type=WholeRange(1, 8), metavar="N", help="--plan, --profile: tokens of a step, 1 to 8 (1).")
@click.option("--mix", type=Mix(), metavar="N:STEPS,...", help="--dispatch: steps of N tokens (1:1,2:1).")
@click.option("--run", is_flag=True, help="--dispatch: run the steps on the GPU and count.")
@click.option("--steps", type=WholeRange(1), metavar="N", help="--profile: steps to measure (50).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
@click.pass_context
def bench(context: click.Context, **options: Any) -> None:
    """Measure tokens a second, or look into a decode step.

    Without a mode: prompt and decode speed at several lengths of the context, plain and with drafts, in one run with
    the memory's copy bandwidth, so that "% roof" says how far a token is from the memory's speed. Both ways have to
    give the same tokens.

    The modes are --plan, --dispatch and --profile; --ctx is then the tokens before the step (4096, or 512 where steps
    run). --plan and --dispatch read the checkpoint's headers only; --profile times the step's operations on a GPU.

    \b
    Examples:
      ds4 bench
      ds4 bench -m model.gguf --ctx 2k,32k --draft 3 --json > run.json
      ds4 bench --synthetic q2 --device cuda --plots plots
      ds4 bench --synthetic official-0731 --layers 4 --shrink 8 --ctx 512
      ds4 bench --plan -m model.gguf --ctx 32k
      ds4 bench --dispatch --mix 1:256,2:64
      ds4 bench --profile moe -m model.gguf --n-tok 2 --json

    The library prints the tables of --profile after generate() where the environment variable DS4_PROFILE is step or
    moe.
    """
    given = {name for name in options if context.get_parameter_source(name) is ParameterSource.COMMANDLINE}
    modes = [name for name in ("plan", "dispatch", "profile") if options[name]]
    if len(modes) > 1:
        raise click.UsageError("choose one of --plan, --dispatch and --profile")
    of_step = {"n_tok": ("plan", "profile"), "steps": ("profile",), "mix": ("dispatch",), "run": ("dispatch",)}
    for name, wanted in of_step.items():
        if name in given and not set(modes) & set(wanted):
            raise click.UsageError(f"{_option(name)} belongs to {' and '.join(map(_option, wanted))}")
    of_modes = {*of_step, "plan", "dispatch", "profile"}
    if not modes:
        chosen = {name: value for name, value in options.items() if name not in of_modes}
        throughput_command(Throughput(**chosen | {"shrink": int(options["shrink"])}))
        return
    shared = {*of_modes, "model", "ctx", "as_json"}
    if stray := sorted(given - shared):
        raise click.UsageError(f"{_option(stray[0])} does not go with --{modes[0]}")
    if options["ctx"] and len(options["ctx"]) > 1:
        raise click.UsageError(f"--ctx: --{modes[0]} takes one length")
    step = {name: options[name] for name in shared if options[name] is not None}
    bench_command(Bench(**step | {"ctx": options["ctx"][0] if options["ctx"] else None}))


def _option(name: str) -> str:
    """A parameter's name on the command line."""
    return f"--{name.replace('_', '-')}"


@main.command()
@click.option("--one-answer", is_flag=True, help="Compare every way to decode with plain decoding, bit for bit.")
@click.option("-m", "--model", metavar="PATH", help="Checkpoint or hub name; the bundled small model if left out.")
@click.option("--device", type=click.Choice(["auto", "cpu", "cuda"]), default="auto", help="Where to run (auto).")
@click.option("--draft-model", metavar="PATH", help="Draft head in a file of its own, or its hub name.")
@click.option("--tokens", type=WholeRange(1), default=50_000, metavar="N", help="Compare at least N tokens (50000).")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def verify(one_answer: bool, **wanted: Any) -> int:
    """Prove that the answer does not depend on how it was computed.

    --one-answer decodes prompts of several kinds and lengths with every draft length, with drafts that are wrong on
    purpose, with prompts cut into chunks, after undone tokens and from a saved session, and compares all tokens and
    logits with plain decoding. Exit code 1 on any difference.

    
    Examples:
      ds4 verify --one-answer
      ds4 verify --one-answer -m model.gguf --device cuda --tokens 2000 --json
    """
    if not one_answer:
        raise click.UsageError("choose what to verify: --one-answer")
    from ds4.cli_verify import verify_command

    return verify_command(**wanted)


@main.command()
@click.argument("name", metavar="REPO[:FILE]")
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def pull(name: str, as_json: bool) -> None:
    """Download a checkpoint from the Hugging Face hub.

    It goes into the hub's own cache (HF_HOME); files that are there already are not fetched again. FILE may be a
    pattern, and one part of a split GGUF brings the others along. Afterwards -m takes the same name.

    \b
    Example:
      ds4 pull antirez/deepseek-v4-gguf:DeepSeek-V4-Flash-MTP-Q4K-Q8_0-F32.gguf
    """
    from ds4.cli_pull import pull_command

    pull_command(name, as_json=as_json)


@main.command()
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object.")
def doctor(as_json: bool) -> int:
    """Say what this machine has and lacks for --device cuda.

    Exit code 0 if --device cuda will work, else 1.
    """
    from ds4.cli_doctor import doctor_command

    return doctor_command(as_json=as_json)
