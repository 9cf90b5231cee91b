"""The command line: words to calls. `kit --help` lists the commands.

Each command imports its code when it runs, so that help and plugin lists need no torch.
"""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TypeAlias

from kit.errors import InputError, disk_full

USER_ERROR = 2
STOPPED = 130

_Arguments = argparse.Namespace
# As text, because this class takes no parameters when it runs.
_Commands: TypeAlias = "argparse._SubParsersAction[argparse.ArgumentParser]"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Returns:
        Exit status: 0 done, 2 something the user can put right, 130 stopped from the keyboard.
    """
    arguments = _parse(argv)
    _configure_logging()
    try:
        arguments.run(arguments)
    except InputError as error:
        return _refuse(str(error))
    except KeyboardInterrupt as stop:
        _refuse(str(stop) or "stopped")
        return STOPPED
    except Exception as error:
        full = disk_full(error)
        if full is not None:
            return _refuse(full)
        if not isinstance(error, OSError) or error.filename is None:
            raise
        return _refuse(f"{error.filename}: {error.strerror}")
    return 0


def _parse(argv: Sequence[str] | None) -> _Arguments:
    """Parse a command; key=value words may stand on either side of options."""
    parser = _parser()
    arguments, rest = parser.parse_known_args(argv)
    is_word = [not word.startswith("-") and "=" in word for word in rest]
    if not all(is_word) or (rest and not hasattr(arguments, "overrides")):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="kit",
        description="Fine-tune video diffusion transformers that make characters talk.",
        epilog="`kit COMMAND --help` tells more about a command.",
    )
    parser.add_argument("--version", action="version", version=f"kit {_version()}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for add in (
        _add_prepare,
        _add_fit,
        _add_pretrain,
        _add_sample,
        _add_export,
        _add_extract,
        _add_check,
        _add_plan,
        _add_plugins,
    ):
        add(commands)
    return parser


def _add(
    commands: _Commands, name: str, text: str, example: str, run: Callable[[_Arguments], None]
) -> argparse.ArgumentParser:
    command = commands.add_parser(
        name,
        help=text,
        description=text[0].upper() + text[1:] + ".",
        epilog=f"example:\n  {example}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    command.set_defaults(run=run)
    return command


def _add_prepare(commands: _Commands) -> None:
    text = "turn a folder of videos, images and speech into shards"
    example = "kit prepare my_clips --out runs/clips --buckets 480"
    add = _add(commands, "prepare", text, example, _prepare).add_argument
    add("source", metavar="SOURCE", help="folder or file to read; shards also by address")
    add("--out", type=Path, required=True, help="folder to write the shards to")
    add("--recipe", help="fit recipe whose base and window the shards are for")
    add("--encode", action="store_true", help="also encode, with the recipe's base")
    add("--window", type=int, metavar="N", help="frames in a training window, 4n + 1")
    add("--buckets", metavar="SIZES", help="480, 720, or sizes HxW such as 64x64,48x80")
    add(
        "--clip-seconds",
        type=float,
        default=15.0,
        metavar="S",
        help="seconds a clip lasts at most (%(default)s)",
    )
    add(
        "--sequence-fps",
        type=float,
        default=25.0,
        metavar="F",
        help="frames per second of numbered images (%(default)s)",
    )
    add("--overwrite", action="store_true", help="replace shards written before")


def _add_fit(commands: _Commands) -> None:
    example = "kit fit recipes/quickstart.yaml trainer.max_steps=20"
    _add_recipe(_add(commands, "fit", "train an adapter as a recipe says", example, _fit))


def _add_pretrain(commands: _Commands) -> None:
    text = "train a network around the denoiser, for a small base of your own"
    example = "kit pretrain recipes/studio/video.yaml"
    _add_recipe(_add(commands, "pretrain", text, example, _pretrain))


def _add_sample(commands: _Commands) -> None:
    example = (
        "kit sample recipes/quickstart_talk.yaml seed=7\n"
        "  kit sample recipes/talk.yaml audio=speech.wav image=portrait.png out=talk.mp4\n"
        "  kit sample recipes/talk.yaml audio=speech.wav video=source.mp4 out=dub.mp4\n\n"
        "keys:\n"
        "  image, video, size     a portrait; a video to dub; neither, from text alone (64x64)\n"
        "  audio, speakers, job   speech of one speaker; of several, with boxes or masks; both\n"
        "                         and the picture as a JSON of InfiniteTalk's own program\n"
        "  adapter, text, seed    what was trained; what is to be seen; another video\n"
        "  sampling.KEY           steps, text_scale, audio_scale, guidance, continuity, ...\n"
        "  base.KEY               path, loras, decode_tile, ...\n"
        "`kit check --schema sample --out sample.schema.json` tells them all"
    )
    command = _add(commands, "sample", "make a video as a recipe says", example, _sample)
    _add_recipe(command)
    command.add_argument(
        "--report",
        action="store_true",
        help="measure the video too, and write the numbers beside it as .report.json",
    )


def _add_recipe(command: argparse.ArgumentParser) -> None:
    command.add_argument(
        "recipe", metavar="RECIPE", help="a YAML file here, or the name of a shipped one"
    )
    command.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="replaces one value of the recipe, such as trainer.max_steps=20",
    )


def _add_export(commands: _Commands) -> None:
    text = "write an adapter in the formats of other programs, or merged into its base"
    example = (
        "kit export runs/talk/adapter.safetensors --to diffusers,comfyui\n"
        "  kit export runs/talk/adapter.safetensors --to base --out models/talk\n\n"
        "formats:\n"
        "  diffusers, comfyui, kohya, peft   the adapter, in the names of that program\n"
        "  base, wan    the whole denoiser with the adapter in it, in diffusers' layout or Wan's\n"
        "  hub          a folder to publish: model card, previews, files of diffusers and ComfyUI\n"
        "  kit          the adapter for this kit again, with --rank or --dtype"
    )
    add = _add(commands, "export", text, example, _export).add_argument
    add("adapter", type=Path, metavar="ADAPTER", help="adapter file written by `kit fit`")
    add("--to", required=True, metavar="FORMATS", help="formats, with commas between them")
    add("--out", type=Path, metavar="FOLDER", help="where to write (beside the adapter)")
    add("--dtype", choices=["bfloat16", "float16", "float32"], help="of the numbers (bfloat16)")
    add("--rank", type=_positive, metavar="R", help="make plain factors of at most this rank")
    add("--trigger", default="", metavar="WORD", help="word that calls for what was learnt")
    add("--without-audio", action="store_true", help="write no merged audio modules")
    add("--verify", action="store_true", help="read back as that program does, and compare")
    add("overrides", nargs="*", metavar="base.key=value", help="where the base is now")


def _positive(text: str) -> int:
    """Read a number of at least 1."""
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _add_extract(commands: _Commands) -> None:
    text = "make an adapter of what changed between two sets of weights"
    example = (
        "kit extract models/Wan2.1-I2V-14B-480P models/tuned.safetensors --out ann.safetensors"
    )
    add = _add(commands, "extract", text, example, _extract).add_argument
    add("base", metavar="BASE", help="folder of the weights as they were")
    add("tuned", metavar="TUNED", help="folder or file of the weights as they are now")
    add("--out", type=Path, required=True, help="adapter file to write")
    add("--rank", type=_positive, default=32, metavar="R", help="of the factors (32)")
    add("--parts", default="attention,ffn,audio", help="parts to compare (all, with commas)")
    add("overrides", nargs="*", metavar="base.key=value", help="for both, such as audio_weights")


def _add_check(commands: _Commands) -> None:
    text = "check recipes, shards or weights without loading, or describe what recipes may hold"
    example = (
        "kit check recipes/quickstart.yaml\n  kit check models/Wan2.1-I2V-14B-480P\n"
        "  kit check --schema fit --out fit.schema.json"
    )
    add = _add(commands, "check", text, example, _check).add_argument
    add(
        "words",
        nargs="*",
        metavar="PATH | key=value",
        help="recipes, folders or files of weights, then overrides",
    )
    add(
        "--schema",
        nargs="?",
        const="fit",
        choices=("fit", "sample", "pretrain"),
        help="describe the recipes of a command (fit if none is named) as a JSON schema",
    )
    add("--out", type=Path, metavar="FILE", help="where to write the description")


def _add_plan(commands: _Commands) -> None:
    text = "tell the memory, time and disk that a run will need, before anything is loaded"
    example = "kit plan recipes/my_character.yaml trainer.device=cuda --memory 80 --rate 400"
    command = _add(commands, "plan", text, example, _plan)
    _add_recipe(command)
    add = command.add_argument
    add("--rate", type=float, metavar="TFLOPS", help="of each process (measured, if it runs here)")
    add("--memory", type=float, metavar="GB", help="of each process's device (what is here)")
    add("--json", type=Path, metavar="FILE", help="where to write the same as JSON")


def _add_plugins(commands: _Commands) -> None:
    text = "list the plugins that recipes can name; write one, check one"
    command = _add(commands, "plugins", text, "kit plugins", _plugins)
    actions = command.add_subparsers(title="commands", metavar="COMMAND")
    text, example = "write a small working plugin and its test", "kit plugins new calm_noise"
    add = _add(actions, "new", text, example, _plugins_new).add_argument
    add("name", metavar="NAME", help="what recipes will call it")
    add("--folder", type=Path, default=Path(), help="where to write it (the current folder)")
    text, example = "try on a tiny base what every plugin must keep to", "kit plugins check apg"
    add = _add(actions, "check", text, example, _plugins_check).add_argument
    add("name", metavar="NAME", help="which plugin")
    add("overrides", nargs="*", metavar="NAME.option=value", help="options in place of defaults")


def _prepare(arguments: _Arguments) -> None:
    from kit.run.prepare import prepare

    prepare(
        arguments.source,
        arguments.out,
        recipe=arguments.recipe,
        encode=arguments.encode,
        window=arguments.window,
        buckets=arguments.buckets,
        clip_seconds=arguments.clip_seconds,
        sequence_fps=arguments.sequence_fps,
        overwrite=arguments.overwrite,
        report=print,
    )


def _fit(arguments: _Arguments) -> None:
    from kit.run.fit import fit

    fit(arguments.recipe, arguments.overrides, report=print)


def _pretrain(arguments: _Arguments) -> None:
    from kit.run.pretrain import pretrain

    pretrain(arguments.recipe, arguments.overrides, report=print)


def _sample(arguments: _Arguments) -> None:
    from kit.run.sample import sample

    sample(arguments.recipe, arguments.overrides, report=print, is_measured=arguments.report)


def _export(arguments: _Arguments) -> None:
    from kit.run.export import Settings, export

    names = (name.strip() for name in arguments.to.split(","))
    formats = list(dict.fromkeys(name for name in names if name))
    settings = Settings(
        dtype=arguments.dtype,
        rank=arguments.rank,
        trigger=arguments.trigger,
        with_audio=not arguments.without_audio,
        verify=arguments.verify,
    )
    export(
        arguments.adapter,
        formats,
        arguments.out,
        print,
        settings=settings,
        overrides=arguments.overrides,
    )


def _extract(arguments: _Arguments) -> None:
    from kit.run.extract import Request, extract_adapter

    parts = tuple(name.strip() for name in arguments.parts.split(",") if name.strip())
    request = Request(
        base=arguments.base,
        tuned=arguments.tuned,
        out=arguments.out,
        rank=arguments.rank,
        parts=parts,
        overrides=arguments.overrides,
    )
    extract_adapter(request, print)


def _check(arguments: _Arguments) -> None:
    overrides = [word for word in arguments.words if "=" in word]
    paths = [word for word in arguments.words if "=" not in word]
    if not paths and arguments.schema is None:
        raise InputError(
            "check: name a recipe, a folder of shards or weights, or --schema fit|sample|pretrain"
        )
    from kit.run.check import check, describe

    if arguments.schema is not None:
        describe(arguments.schema, out=arguments.out, report=print)
    if paths:
        check(paths, overrides, report=print)


def _plan(arguments: _Arguments) -> None:
    from kit.run.plan import plan

    given = {"rate": arguments.rate, "memory": arguments.memory, "out": arguments.json}
    plan(arguments.recipe, arguments.overrides, print, **given)


def _plugins(arguments: _Arguments) -> None:
    from kit.run.plugin_list import list_plugins

    list_plugins(print)


def _plugins_new(arguments: _Arguments) -> None:
    from kit.run.plugin_new import write_skeleton

    write_skeleton(arguments.name, arguments.folder, print)


def _plugins_check(arguments: _Arguments) -> None:
    from kit.run.plugin_check import check_plugin

    # What is told of each video would stand between the outcomes.
    logging.getLogger("kit").setLevel(logging.WARNING)
    check_plugin(arguments.name, arguments.overrides, print)


def _configure_logging() -> None:
    logging.basicConfig(format="%(message)s")
    logging.getLogger("kit").setLevel(logging.INFO)
    # On import it warns of an optional CPU kernel that no recipe of ours uses.
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def _version() -> str:
    try:
        return version("charakit")
    except PackageNotFoundError:
        return "(a checkout that is not installed)"


def _refuse(message: str) -> int:
    print("\n".join(f"kit: {line}" for line in message.splitlines()), file=sys.stderr)
    return USER_ERROR
