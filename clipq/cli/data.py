"""`clipq-data`: makes shards, counts their samples, checks them, shows what is in them."""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import sys
import time
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from clipq.cli.arguments import Parser
from clipq.data.parallel import cores

if TYPE_CHECKING:
    from clipq.data.check import Fault, Rules
    from clipq.data.pack_sources import Source
    from clipq.data.stats import Stats
    from clipq.log.console import Console

EXAMPLE = """\
examples:
  clipq-data make photos/ shards/                      a folder with one sub-folder for each class
  clipq-data make captions.csv shards/                 a table with the columns filepath and title
  clipq-data index  '/data/laion/{00000..00999}.tar'   counts samples, writes clipq_index.json
  clipq-data verify '/data/laion/*.tar' --decode       exit status 1 where anything is wrong
  clipq-data stats  '/data/laion/*.tar' --limit 10000  sizes, lengths and a contact sheet

clipq-data COMMAND --help tells the options of a command.
"""
TOLD = 20
"""Lines about faults of one kind, or about samples left out; the others are counted."""


def main(argv: Sequence[str] | None = None) -> int:
    """Runs a subcommand.

    Returns:
        The exit status: 0; 1 where something is wrong with the data; 2 where the command is wrong (one line on stderr
        says how); 130 after Ctrl-C.
    """
    arguments = _parser().parse_args(argv)
    for stream in (sys.stdout, sys.stderr):  # a terminal that lacks a letter gets a question mark, not a traceback
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    # What takes seconds to import is imported where it is used, so that --help and wrong usage answer at once.
    from clipq.data.parallel import WorkerError
    from clipq.log.console import Console, setup_logging

    console = Console(stream=sys.stderr)
    setup_logging(console, file=None)
    try:
        status: int = arguments.run(arguments, console)
    except KeyboardInterrupt:
        status = _fail(console, "stopped", 130)
    except WorkerError as error:
        status = _fail(console, str(error), 1)
    except OSError as error:
        where = f"{error.filename}: " if error.filename else ""
        status = _fail(console, f"{where}{error.strerror or error}", 2)
    except (ImportError, ValueError) as error:
        status = _fail(console, str(error), 2)
    console.close()
    return status


def _fail(console: Console, message: str, status: int) -> int:
    console.message(f"clipq-data: {' '.join(message.split())}")
    return status


class _Progress:
    """Shards and samples done, samples a second, time to go: in place on a terminal, else a line each minute."""

    def __init__(self, console: Console, shards: int) -> None:
        self._console, self._all = console, shards
        self._begun, self._shown = time.monotonic(), 0.0
        self._shards = self._samples = 0
        self._known = 0
        """Shards that took no time."""

    def add(self, samples: int, *, new: bool = True) -> None:
        """One more shard is done, unless it was so before."""
        if not new:
            self._known += 1
            return
        self._shards += 1
        self._samples += samples
        now = time.monotonic()
        if now - self._shown < 0.2:
            return
        from clipq.log.console import format_duration

        self._shown, seconds = now, now - self._begun
        done = self._shards + self._known
        left = format_duration(seconds / self._shards * (self._all - done))
        self._console.status(
            f"{done:,}/{self._all:,} shards | {self._samples:,} samples | "
            f"{self._samples / max(seconds, 1e-3):,.0f} samples/s | ETA {left}"
        )


def _index(arguments: argparse.Namespace, console: Console) -> int:
    from clipq.data.index import INDEX, Entry, index_shards
    from clipq.data.shards import expand

    shards = _files(expand(arguments.shards))
    progress = _Progress(console, len(shards))
    samples = damaged = 0
    with contextlib.closing(index_shards(shards, workers=arguments.workers, again=arguments.again)) as results:
        for shard, found, read in results:
            if isinstance(found, Entry):
                samples += found.samples
                progress.add(found.samples, new=read)
            else:
                damaged += 1
                console.message(f"{shard} is damaged and not in the index: {found}")
                progress.add(0)
    console.close()
    print(f"{len(shards) - damaged:,} shards with {samples:,} samples are in {INDEX} beside them; {damaged:,} damaged")
    return 1 if damaged else 0


def _verify(arguments: argparse.Namespace, console: Console) -> int:
    from clipq.data.check import check_shards, find, same_keys

    shards, faults = find(arguments.shards)
    rules = _rules(arguments, decode=arguments.decode, max_member=arguments.max_member)
    progress = _Progress(console, len(shards))
    checked = {}
    with contextlib.closing(check_shards(_files(shards), rules, workers=arguments.workers)) as results:
        for shard, checked[shard] in results:
            progress.add(checked[shard].keys.size)
    console.close()
    faults += [fault for shard in shards for fault in checked[shard].faults]
    faults += same_keys({shard: checked[shard].keys for shard in shards})
    samples = sum(c.keys.size for c in checked.values())
    print("\n".join([*_told(faults), f"{len(shards):,} shards with {samples:,} samples were read", *_counts(faults)]))
    return 1 if faults else 0


def _told(faults: list[Fault]) -> list[str]:
    """A line for each fault; of one kind no more than `TOLD`."""
    lines, seen = [], Counter[str]()
    for fault in faults:
        seen[fault.kind] += 1
        if seen[fault.kind] <= TOLD:
            times = f" ({fault.count:,} samples)" if fault.count > 1 else ""
            lines.append(f"{fault.shard}: {fault.kind}{times}: {fault.text}")
    lines += [f"... and {n - TOLD:,} more lines of {kind}" for kind, n in seen.items() if n > TOLD]
    return lines


def _counts(faults: list[Fault]) -> list[str]:
    """A table of the kinds of faults."""
    from clipq.data.check import KINDS

    if not faults:
        return ["nothing is wrong with them"]
    lines = [f"{'fault':<18}  {'shards':>8}  {'times':>10}"]
    for kind in KINDS:
        found = [f for f in faults if f.kind == kind]
        if found:
            lines.append(f"{kind:<18}  {len({f.shard for f in found}):>8,}  {sum(f.count for f in found):>10,}")
    return lines


def _stats(arguments: argparse.Namespace, console: Console) -> int:
    from clipq.data.index import write_whole
    from clipq.data.shards import expand, spread
    from clipq.data.sheet import contact_sheet
    from clipq.data.stats import Stats, look

    shards, each = spread(_files(expand(arguments.shards)), arguments.limit)
    output: Path = arguments.output
    output.mkdir(parents=True, exist_ok=True)
    progress, stats = _Progress(console, len(shards)), Stats()
    with contextlib.closing(look(shards, _rules(arguments), each=each, workers=arguments.workers)) as results:
        for one in results:
            stats.add(one)
            progress.add(one.samples)
    console.close()
    write_whole(output / "stats.json", (json.dumps(stats.record(), indent=1) + "\n").encode())
    sheet = io.BytesIO()
    contact_sheet([(picked.image, picked.caption) for picked in stats.picked]).save(sheet, "PNG")
    write_whole(output / "contact_sheet.png", sheet.getvalue())
    print("\n".join(_summary(stats)))
    print(f"wrote {output / 'stats.json'} and {output / 'contact_sheet.png'}")
    return 0 if stats.samples else 1


def _summary(stats: Stats) -> list[str]:
    record = stats.record()
    rows = {**record["pixels"], "aspect": record["aspect"], "caption characters": record["caption_characters"]}
    rows |= {f"json.{name}": row for name, row in record["json"].items()}
    names = list(record["caption_characters"] or record["pixels"]["width"])
    lines = [
        f"{stats.shards:,} shards of {stats.bytes:,} bytes; {stats.samples:,} of their samples were looked at",
        "formats: " + (", ".join(f"{name} {count:,}" for name, count in record["formats"].items()) or "none"),
        f"{'quantile':<18}" + "".join(f"{name:>9}" for name in names),
    ]
    lines += [f"{name:<18}" + "".join(f"{v:>9,.7g}" for v in row.values()) for name, row in rows.items()]
    lines.append(f"empty captions: {record['share_of_samples_with_empty_caption']:.2%} of the samples")
    faults = ", ".join(f"{kind} {count:,}" for kind, count in record["faults"].items())
    return [*lines, f"faults: {faults or 'none'}"]


def _make(arguments: argparse.Namespace, console: Console) -> int:
    from clipq.data.index import write_whole
    from clipq.data.pack import pack
    from clipq.data.pack_sources import ClassFolder, Shards

    output: Path = arguments.output
    work = output / ".unpacked"
    with _removed(work):
        source = _source(arguments, work, console)
        if not len(source):
            raise ValueError(f"{arguments.source[0]}: no samples could be read from it")
        options = {"per_shard": arguments.per_shard, "seed": arguments.seed, "workers": arguments.workers}
        progress = _Progress(console, -(-len(source) // arguments.per_shard))
        shards = samples = told = 0
        with contextlib.closing(pack(source, output, **options)) as results:
            for packed in results:
                for text in packed.left_out:
                    told += 1
                    if told <= TOLD:
                        console.message(f"left out: {text}" + (" (others are counted)" if told == TOLD else ""))
                shards += packed.entry is not None
                samples += packed.entry.samples if packed.entry else 0
                progress.add(packed.entry.samples if packed.entry else 0, new=packed.made)
        if isinstance(source, ClassFolder) and samples:
            write_whole(output / "classnames.txt", "".join(f"{name}\n" for name in source.names).encode())
    if not samples:
        return _fail(console, f"none of {len(source):,} samples could be read: see the lines before", 1)
    damaged = len(source.damage) if isinstance(source, Shards) else 0
    left_out = len(source) - samples
    console.close()
    print(
        f"{shards:,} shards with {samples:,} samples are in {output}; {left_out:,} samples were left out"
        + (f" (mended, they come in after {output} is removed)" if left_out else "")
        + (f", and {damaged:,} of the sources are damaged" if damaged else "")
    )
    if isinstance(source, ClassFolder) and source.others:
        kinds = ", ".join(f"{count:,} {end or 'without an ending'}" for end, count in source.others.most_common(5))
        print(f"{source.others.total():,} other files were not packed ({kinds})")
    return 1 if damaged else 0


@contextlib.contextmanager
def _removed(folder: Path):
    """Removes a folder at the end."""
    import shutil

    try:
        yield
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _source(arguments: argparse.Namespace, work: Path, console: Console) -> Source:
    """What the command names: a folder, a table or shards."""
    from clipq.data.pack_sources import Shards, TableRows, class_folder, read_shards
    from clipq.data.shards import expand
    from clipq.data.table import Columns, Table, is_table

    first = Path(arguments.source[0]).expanduser()
    is_folder, names_table = first.is_dir(), is_table(first.name)
    if not is_folder and (arguments.classnames or arguments.template):
        raise ValueError(f"--classnames and --template are for a folder of class folders, which {first} is not")
    if (is_folder or names_table) and len(arguments.source) > 1:
        raise ValueError(f"expected one SOURCE beside {first}, or shards alone: {' '.join(arguments.source)}")
    if is_folder:
        if arguments.output.absolute().is_relative_to(first.absolute()):
            raise ValueError(f"{arguments.output} lies in {first}, where it would be taken for a class")
        return class_folder(first, _classnames(arguments), _templates(arguments), arguments.seed)
    if names_table:
        options = "--image-column", "--caption-column"
        return TableRows(Table(first, Columns(arguments.image_column, arguments.caption_column, options)))
    if not any(".tar" in name for name in arguments.source):
        raise ValueError(
            f"{first}: expected a folder of class folders, a .csv, .tsv or .parquet that exists, or shards"
        )
    source: Shards = read_shards(_files(expand(arguments.source)), work, workers=arguments.workers)
    for text in source.damage:
        console.message(f"warning: not all samples can be read from {text}")
    return source


def _classnames(arguments: argparse.Namespace) -> list[str] | None:
    from clipq.eval.prompts import read_classnames

    return read_classnames(arguments.classnames) if arguments.classnames else None


def _templates(arguments: argparse.Namespace) -> list[str]:
    templates = [t.replace("{c}", "{}") for t in arguments.template or ["a photo of a {}"]]
    for template in templates:
        if "{}" not in template:
            raise ValueError(f"--template {template!r} has no {{}} for the class name")
    return templates


def _files(shards: list[str]) -> list[str]:
    from clipq.data.remote import is_url

    addresses = [shard for shard in shards if is_url(shard)]
    if addresses:
        raise ValueError(f"{addresses[0]} is an address: clipq-data reads files alone, so copy it here first")
    return shards


def _rules(arguments: argparse.Namespace, *, decode: bool = False, max_member: float | None = None) -> Rules:
    from clipq.data.check import Rules
    from clipq.data.decode import Captions

    captions = Captions(arguments.caption, arguments.lines)
    bound = {} if max_member is None else {"max_member": round(max_member * 2**20)}
    return Rules(arguments.image, captions, decode=decode, **bound)


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="clipq-data",
        description="Makes shards, counts their samples, checks them, and shows what is in them.",
        epilog=EXAMPLE,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    index = commands.add_parser("index", help="count the samples of shards into clipq_index.json beside them")
    index.add_argument("--again", action="store_true", help="read shards too that the index has in their size")
    verify = commands.add_parser("verify", help="tell all that is wrong with shards")
    verify.add_argument("--decode", action="store_true", help="decode every image; otherwise its header alone")
    verify.add_argument(
        "--max-member", type=_megabytes, default=100, metavar="MIB", help="bound of a member (%(default)s)"
    )
    stats = commands.add_parser("stats", help="sizes of images, lengths of captions, a contact sheet")
    stats.add_argument("--output", type=Path, default=Path("stats"), metavar="FOLDER", help="default: %(default)s")
    stats.add_argument("--limit", type=_count, metavar="N", help="look at no more samples than this")
    for command in (index, verify, stats):
        command.add_argument("shards", nargs="+", metavar="SHARDS", help="paths, '{00..99}.tar' ranges or globs")
    for command in (verify, stats):
        command.add_argument("--image", default="jpg;jpeg;png;webp", help="as data.image (%(default)s)")
        command.add_argument("--caption", default="txt", help="as data.caption.field (%(default)s)")
        command.add_argument("--lines", action="store_true", help="as data.caption.lines")
    make = commands.add_parser("make", help="write shards from a folder, a table or other shards")
    _add_make(make)
    runs = {index: _index, verify: _verify, stats: _stats, make: _make}
    for command, run in runs.items():
        command.add_argument("--workers", type=_count, default=cores(), metavar="N", help="processes (%(default)s)")
        command.set_defaults(run=run)
    return parser


def _add_make(make: argparse.ArgumentParser) -> None:
    make.add_argument(
        "source", nargs="+", metavar="SOURCE", help="a folder of class folders, a .csv, .tsv or .parquet, or shards"
    )
    make.add_argument("output", type=Path, metavar="OUTPUT", help="folder to write to")
    make.add_argument("--per-shard", type=_count, default=1000, metavar="N", help="samples at most (%(default)s)")
    make.add_argument("--seed", type=int, default=0, help="decides the order (%(default)s)")
    make.add_argument("--classnames", metavar="FILE", help="names of the classes, one a line, or openclip:imagenet")
    make.add_argument(
        "--template", action="append", metavar="TEXT", help="caption with {} for the class name; repeatable"
    )
    make.add_argument("--image-column", default="filepath", metavar="NAME", help="of a table (%(default)s)")
    make.add_argument("--caption-column", default="title", metavar="NAME", help="of a table (%(default)s)")


def _count(text: str) -> int:
    number = int(text) if text.isascii() and text.isdigit() else 0
    if number < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, not {text!r}")
    return number


def _megabytes(text: str) -> float:
    try:
        number = float(text)
    except ValueError:
        number = 0.0
    if not 0 < number < 2**40:
        raise argparse.ArgumentTypeError(f"expected MiB, a number above 0, not {text!r}")
    return number


if __name__ == "__main__":
    sys.exit(main())
