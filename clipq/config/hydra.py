"""Hydra around the dataclasses of `schema`: composition, entry points, and errors a person can act on."""

from __future__ import annotations

import ast
import difflib
import functools
import inspect
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, TypeVar

import hydra
from hydra.core.config_store import ConfigStore
from hydra.errors import HydraException, MissingConfigException, OverrideParseException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import ConfigAttributeError, ConfigKeyError, OmegaConfBaseException, ValidationError

from clipq.config.checks import ConfigError
from clipq.config.schema import EvalJob, TrainJob

Job = TypeVar("Job", TrainJob, EvalJob)


def configs_dir() -> Path:
    """The folder of YAML files: the repository's `configs/` where clipq runs from a checkout, else the packaged one.

    An editable install leaves a copy in site-packages that goes stale; the one beside the sources always wins.
    """
    root = Path(__file__).resolve().parents[2]
    if (root / "pyproject.toml").is_file() and (root / "configs" / "train.yaml").is_file():
        return root / "configs"
    return Path(__file__).resolve().parents[1] / "configs"


def register(resolvers: dict[str, Callable[..., Any]]) -> None:
    """Makes the dataclasses known to Hydra and adds `resolvers` (name -> function) for `${name:…}` in YAML."""
    store = ConfigStore.instance()
    store.store(name="train_schema", node=TrainJob)
    store.store(name="eval_schema", node=EvalJob)
    for name, function in {"clipq.stem": lambda path: Path(path).stem, **resolvers}.items():
        OmegaConf.register_new_resolver(name, function, replace=True)


def composed(config_name: str, overrides: Sequence[str]) -> DictConfig:
    """What overrides compose to, without a command; after `register`.

    Raises:
        HydraException, OmegaConfBaseException: they cannot be read; `explain` says what is wrong.
    """
    with hydra.initialize_config_dir(str(configs_dir()), version_base="1.3"):
        return hydra.compose(config_name, list(overrides))


def to_job(cfg: DictConfig, kind: type[Job]) -> Job:
    """The composed configuration as the typed object that the rest of the program sees.

    Raises:
        ConfigError: a key that `kind` does not have (`+new=key`), a setting that is not set, a value of a wrong type
            or one that its dataclass refuses.
    """
    for path, known in _unknown_keys(cfg, kind, ""):
        raise ConfigError(_no_such_setting(path, known))
    for path in [*sorted(OmegaConf.missing_keys(cfg)), *_unset_parts(cfg)]:
        raise ConfigError(f"{path} is not set. It is: {_doc_of(kind, path)}")
    try:
        job = OmegaConf.to_object(cfg)
    except OmegaConfBaseException as error:
        raise ConfigError(explain(error, kind)) from error
    assert isinstance(job, kind)
    return job


class RunFailedError(RuntimeError):
    """A run of a grid has failed, in a job of its own."""


_here = False
"""Whether this process has the command line. False in a job that a launcher of Hydra started for a run of a grid."""


def is_launched() -> bool:
    # A function, since cloudpickle would take the value along to the job.
    return not _here


class _Resolvers:
    """Registers functions for `${name:…}` in YAML, also in a job that this object travels to."""

    def __init__(self, resolvers: dict[str, Callable[..., Any]]) -> None:
        register(resolvers)
        self.resolvers = resolvers

    def __reduce__(self) -> tuple:
        return _Resolvers, (self.resolvers,)


def run(
    kind: type[Job],
    config_name: str,
    function: Callable[[Job, str], None],
    launched: Callable[[Job, str], None],
    **resolvers: Callable,
) -> None:
    """Entry point of a command: composes `config_name` with the command line and calls `function(job, yaml)`.

    With `--multirun hydra/launcher=submitit_slurm` and the like, `launched(job, yaml)` is called in jobs elsewhere.

    A mistake in the configuration ends the process with exit code 2 and one message, printed by rank 0 only.
    """
    global _here
    _here = True
    registered = _Resolvers({f"clipq.{name}": f for name, f in resolvers.items()})
    sys.argv[1:] = [_add_entries(_quote_braces(a), kind) for a in sys.argv[1:]]
    os.environ["HYDRA_FULL_ERROR"] = "1"  # Hydra then raises instead of printing its own half of the story

    jobs: list[tuple[Job, str]] = []

    @hydra.main(version_base="1.3", config_path=str(configs_dir()), config_name=config_name)
    def compose(cfg: DictConfig) -> None:
        assert registered  # named here, it travels along with this function to a job that is launched
        if is_launched():
            _run_launched(cfg, kind, launched)
            return
        try:
            jobs.append((to_job(cfg, kind), OmegaConf.to_yaml(cfg, resolve=True)))
        except (OmegaConfBaseException, ConfigError) as error:
            _fail(explain(error, kind))

    try:
        try:
            compose()
        except (AssertionError, AttributeError) as error:  # OmegaConf's, of a part of what is null
            if "NoneType" not in str(error):
                raise
            raise ConfigError(
                "an override is for a part of what is not set, such as the filter of a source: write it where the "
                "source is named, as in 'data.sources={a: {shards: a.tar, filter: {min_size: 200}}}'"
            ) from error
        # Not within Hydra: its frames would stand above those of an error, and --multirun checks every job first.
        _check_folders([job for job, _ in jobs])
        for job, yaml in jobs:
            function(job, yaml)
    except RunFailedError as error:
        print(f"{Path(sys.argv[0]).stem}: {error}", file=sys.stderr, flush=True)
        raise SystemExit(1) from error
    except (HydraException, OmegaConfBaseException, ConfigError) as error:
        _fail(explain(error, kind))


def _run_launched(cfg: DictConfig, kind: type[Job], function: Callable[[Job, str], None]) -> None:
    """What `run` does, in a job that a launcher started: there a failure has to be an exception, for the launcher
    takes that to where the command was given. Only an end that the job comes back from is an exit."""
    try:
        function(to_job(cfg, kind), OmegaConf.to_yaml(cfg, resolve=True))
    except (OmegaConfBaseException, ConfigError) as error:
        message = explain(error, kind)
        print(message, file=sys.stderr, flush=True)
        raise RunFailedError(message) from None
    except SystemExit as end:
        if end.code == QUEUED_AGAIN:
            raise
        raise RunFailedError(f"a run has failed with code {end.code}; the log of its job says why") from end


QUEUED_AGAIN = 75
"""What `launched` exits with where its job comes back: the code of a run that was asked to end (`clipq.dist.stop`)."""


def _check_folders(jobs: list[Any]) -> None:
    folders = [(job.runs, job.name) for job in jobs if isinstance(job, TrainJob)]
    for runs, name in folders:
        if folders.count((runs, name)) > 1:
            raise ConfigError(
                f"--multirun: more than one job would use the run folder {runs}/{name}: put what differs into the "
                "name, as in 'name=lr_${optim.lr}' (with single quotes)"
            )


def _fail(message: str) -> typing.NoReturn:
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"{Path(sys.argv[0]).stem}: {message}", file=sys.stderr, flush=True)
    raise SystemExit(2)


def _quote_braces(argument: str) -> str:
    """Quotes the value of `key=path/{00000..00099}.tar`, or such an element of a list: Hydra's grammar would read the
    braces as a dictionary."""
    key, equals, value = argument.partition("=")
    if value.startswith("[") and value.endswith("]"):
        return f"{key}=[{_ELEMENT.sub(lambda element: _quote_range(element[0]), value[1:-1])}]"
    return f"{key}={_quote_range(value)}" if equals else argument


def _add_entries(argument: str, kind: type) -> str:
    """Lets `data.sources={a: {…}}` and `data.filter.json.a=[0,1]` add entries, which Hydra does only with `++`."""
    key, _, value = argument.partition("=")
    holder, at = _type_at(kind, key.rpartition(".")[0]), _type_at(kind, key)
    if typing.get_origin(holder) is dict:
        adds = not is_dataclass(at)  # which Hydra would add as a bare dictionary
    else:
        adds = value.startswith("{") and "." in key and at is not None
    return f"++{argument}" if adds else argument


_ELEMENT = re.compile(r"""(?=[^\s,])(?:'[^']*'|"[^"]*"|\{[^}]*\}|[^,])+""")
"""Of a list: up to a comma outside of quotes and braces."""


def _quote_range(text: str) -> str:
    has_range = re.search(r"\{[\w,]+(\.\.|,)[\w,.]+\}", text)
    return f'"{text}"' if has_range and text[0] not in "'\"[{" else text


# --- what a type declares -----------------------------------------------------------------------------------------


@functools.cache
def field_docs(kind: type) -> dict[str, str]:
    """Field -> the string that stands beneath its declaration."""
    body = ast.parse(inspect.getsource(kind)).body[0]
    assert isinstance(body, ast.ClassDef)
    docs = {}
    for node, after in zip(body.body, body.body[1:], strict=False):
        text = after.value.value if isinstance(after, ast.Expr) and isinstance(after.value, ast.Constant) else None
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name) and isinstance(text, str):
            docs[node.target.id] = " ".join(text.split())
    return docs


def field_types(kind: type) -> dict[str, Any]:
    """Field -> its type, `X | None` reduced to `X`."""
    hints = typing.get_type_hints(kind)
    return {f.name: _unwrap_optional(hints[f.name]) for f in fields(kind)}


def _unwrap_optional(hint: Any) -> Any:
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return next(a for a in typing.get_args(hint) if a is not type(None))
    return hint


def _type_at(kind: type, path: str) -> Any:
    """The type of the setting at a dotted path; None where there is no such setting."""
    at: Any = kind
    for part in path.split("."):
        if is_dataclass(at):
            at = field_types(typing.cast(type, at)).get(part)
        elif typing.get_origin(at) is dict:
            at = typing.get_args(at)[1]
        else:
            return None
    return at


def _doc_of(kind: type, path: str) -> str:
    parent, _, leaf = path.rpartition(".")
    at = _type_at(kind, parent) if parent else kind
    if typing.get_origin(at) is dict:
        return f"an entry of {parent}"
    return field_docs(at).get(leaf, "a setting") if is_dataclass(at) else "a setting"


def _unknown_keys(node: Any, kind: Any, path: str) -> Iterator[tuple[str, list[str]]]:
    """Keys of a composed node that its dataclass does not declare, each with the names that it does declare."""
    if not isinstance(node, DictConfig) or node._is_none() or node._is_missing():
        return
    if is_dataclass(kind):
        known = field_types(typing.cast(type, kind))
        for key in node:
            at = f"{path}.{key}" if path else str(key)
            if key not in known:
                yield at, list(known)
            elif not OmegaConf.is_missing(node, key) and not OmegaConf.is_interpolation(node, key):
                yield from _unknown_keys(node._get_node(key), known[str(key)], at)
    elif typing.get_origin(kind) is dict:
        for key in node:
            yield from _unknown_keys(node._get_node(key), typing.get_args(kind)[1], f"{path}.{key}")


def _unset_parts(cfg: DictConfig) -> Iterator[str]:
    """Settings that are null but stand inside another, as in `${data.root}/train`: it would become `None/train`."""
    values = [OmegaConf.to_container(cfg, resolve=False)]
    while values:
        value = values.pop(0)
        if isinstance(value, (dict, list)):
            values += value.values() if isinstance(value, dict) else value
        elif isinstance(value, str):
            for path in re.findall(r"\$\{([\w.]+)\}", value):
                if value != f"${{{path}}}" and OmegaConf.select(cfg, path) is None:
                    yield path


# --- messages -----------------------------------------------------------------------------------------------------


def _no_such_setting(path: str, known: list[str]) -> str:
    parent, _, leaf = path.rpartition(".")
    known = known if parent else [*known, "experiment"]  # a group that selects settings and has none of its own
    close = difflib.get_close_matches(leaf, known, n=1)
    prefix = f"{parent}." if parent else ""
    hint = f" Did you mean {prefix}{close[0]}?" if close else ""
    return f"{path}: no such setting.{hint} {parent or 'The top level'} has: {', '.join(known)}"


def explain(error: BaseException, kind: type) -> str:
    """One readable message for what Hydra or OmegaConf found wrong."""
    if isinstance(error, OverrideParseException):
        return (
            f"cannot read the override {error.override!r}: {_first_line(error)}\n"
            "Overrides are key=value; quote values with spaces or special characters, as in 'key=\"a value\"'"
        )
    if isinstance(error, MissingConfigException):
        return _explain_missing_option(error)
    cause = error.__cause__ if isinstance(error, HydraException) and error.__cause__ is not None else error
    key = getattr(cause, "full_key", None) or ""
    if isinstance(cause, (ConfigKeyError, ConfigAttributeError)) and key:
        at = _type_at(kind, key.rpartition(".")[0]) if "." in key else kind
        return _no_such_setting(key, list(field_types(typing.cast(type, at))) if is_dataclass(at) else [])
    if isinstance(cause, ConfigError):
        return str(cause)
    if isinstance(cause, ValidationError) and key:
        return _wrong_value(_full_path(key, error), cause, kind)
    match = re.match(r"\w+ raised while resolving interpolation: (.+)", str(cause))
    if match:  # what a resolver says, between OmegaConf's own words
        return match[1]
    match = re.search(r"Could not override '([^']+)'", str(error))
    if match:
        return _no_such_group(match[1])
    return str(error)


def _full_path(key: str, error: BaseException) -> str:
    """The path of a setting, of which OmegaConf knows the last part only where Hydra adds it to a group."""
    added = re.search(r"override \+*([\w.]+)=", str(error))
    return added[1] if added and added[1].endswith(f".{key}") else key


def _wrong_value(path: str, error: ValidationError, kind: type) -> str:
    parent, _, name = path.rpartition(".")
    hint = f", written as in '{parent}={{{name}: {{…}}}}'" if typing.get_origin(_type_at(kind, parent)) is dict else ""
    return f"{path}: {_first_line(error)}. It is: {_doc_of(kind, path)}{hint}"


def _explain_missing_option(error: MissingConfigException) -> str:
    group, _, option = (error.missing_cfg_file or "").rpartition("/")
    inside = configs_dir() / group
    # of eval=suite/x Hydra lists the options of eval
    choices = sorted(p.stem for p in inside.glob("*.yaml")) if "/" in group and inside.is_dir() else error.options or []
    choices = sorted(choices)
    if not group:
        return str(error)
    close = difflib.get_close_matches(option, choices, n=1)
    hint = f" Did you mean {group}={close[0]}?" if close else ""
    return (
        f"{group}={option}: no such option.{hint} {group} has: {', '.join(choices)}\n"
        f"Your own go into a folder FOLDER/{group}/{option}.yaml named with --config-dir FOLDER"
    )


def _no_such_group(name: str) -> str:
    if name == "scale":
        return "scale is a part of some experiments: choose one, as in experiment=paper/fig1_precision scale=small"
    groups = sorted(p.name for p in configs_dir().iterdir() if p.is_dir() and p.name not in ("arch", "scale"))
    close = difflib.get_close_matches(name, [*groups, *field_types(TrainJob)], n=1)
    hint = f" Did you mean {close[0]}?" if close else ""
    return f"{name}: no such setting or group.{hint} Groups: {', '.join(groups)}"


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0]
