"""YAML and --set into dataclasses: what is accepted, what wins, and how every mistake is named."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Literal

import pytest

from posemap_fast.config import diff, dump_yaml, from_dict, load_config, to_dict
from posemap_fast.errors import ConfigError


@dataclasses.dataclass(frozen=True)
class Optimizer:
    learning_rate: float = 1e-3
    betas: tuple[float, float] = (0.9, 0.99)
    kind: Literal["adam", "sgd"] = "adam"

    def __post_init__(self) -> None:
        if self.learning_rate <= 0:
            raise ConfigError(f"learning_rate must be > 0; got {self.learning_rate:g}")


@dataclasses.dataclass(frozen=True)
class Field:
    n_levels: int = 16
    layers: tuple[int, ...] = (64, 64)
    aabb_m: float | None = None
    is_shared: bool = True
    optimizer: Optimizer = dataclasses.field(default_factory=lambda: Optimizer(learning_rate=1e-2))


@dataclasses.dataclass(frozen=True)
class Run:
    name: str = "room"
    field: Field = dataclasses.field(default_factory=Field)
    weights: dict[str, float] = dataclasses.field(default_factory=lambda: {"pose": 1.0, "image": 1.0})
    second: Optimizer | None = None


@dataclasses.dataclass(frozen=True)
class Table:
    rows: dict[str, Optimizer] = dataclasses.field(default_factory=lambda: {"base": Optimizer(learning_rate=0.5)})


@dataclasses.dataclass(frozen=True)
class NeedsRows:
    rows: dict[str, Optimizer]


@dataclasses.dataclass(frozen=True)
class Needs:
    path: str


@dataclasses.dataclass(frozen=True)
class Pair:
    a: int = 0
    b: int = 0

    def __post_init__(self) -> None:
        if self.a > self.b:
            raise ConfigError("the interval is empty")


def written(tmp_path: Path, text: str, name: str = "run.yaml") -> Path:
    path = tmp_path / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def error_of(tmp_path: Path, text: str) -> str:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(Run, path)
    message = str(caught.value)
    assert message.startswith(str(path)), message
    assert "\n" not in message
    return message.removeprefix(str(path))


def test_no_layer_gives_the_defaults() -> None:
    assert load_config(Run) == Run()


def test_an_empty_file_gives_the_defaults(tmp_path: Path) -> None:
    assert load_config(Run, written(tmp_path, "# nothing\n")) == Run()


@pytest.mark.parametrize("text", ["1e-4", "1E-4", "0.0001", "1.0e-4", ".0001", "+1e-4"])
def test_every_way_to_write_a_float_is_a_float(tmp_path: Path, text: str) -> None:
    run = load_config(Run, written(tmp_path, f"field: {{optimizer: {{learning_rate: {text}}}}}"))
    assert run.field.optimizer.learning_rate == 1e-4


def test_a_whole_number_is_a_valid_float_and_becomes_one(tmp_path: Path) -> None:
    value = load_config(Run, written(tmp_path, "field: {aabb_m: 3}")).field.aabb_m
    assert value == 3.0
    assert isinstance(value, float)


def test_infinity_is_a_float_and_not_a_number_is_not(tmp_path: Path) -> None:
    assert load_config(Run, written(tmp_path, "field: {aabb_m: .inf}")).field.aabb_m == math.inf
    assert "field.aabb_m: must be a number or null" in error_of(tmp_path, "field: {aabb_m: .nan}")


def test_the_word_no_is_text_and_never_false(tmp_path: Path) -> None:
    assert load_config(Run, written(tmp_path, "name: no")).name == "no"
    assert error_of(tmp_path, "field: {is_shared: no}") == ": field.is_shared: must be true or false; got 'no' (str)"


def test_null_is_allowed_where_the_field_is_optional(tmp_path: Path) -> None:
    assert load_config(Run, written(tmp_path, "field: {aabb_m: null}\nsecond: null")).field.aabb_m is None
    assert "field.n_levels: must be a whole number; got null" in error_of(tmp_path, "field: {n_levels: }")


def test_an_optional_section_can_be_given(tmp_path: Path) -> None:
    assert load_config(Run, written(tmp_path, "second: {kind: sgd}")).second == Optimizer(kind="sgd")


def test_tuples_of_fixed_and_of_any_length(tmp_path: Path) -> None:
    run = load_config(Run, written(tmp_path, "field:\n  layers: [8, 8, 8]\n  optimizer: {betas: [0.5, 1]}"))
    assert run.field.layers == (8, 8, 8)
    assert run.field.optimizer.betas == (0.5, 1.0)
    assert "must be a list of 2 values; got 3" in error_of(tmp_path, "field: {optimizer: {betas: [1, 2, 3]}}")
    assert "field.layers: [1] must be a whole number; got 'x' (str)" in error_of(tmp_path, "field: {layers: [8, x]}")


def test_a_default_set_by_the_parent_survives_a_partial_section(tmp_path: Path) -> None:
    run = load_config(Run, written(tmp_path, "field: {optimizer: {kind: sgd}}"))
    assert run.field.optimizer == Optimizer(learning_rate=1e-2, kind="sgd")


def test_dictionaries_merge_with_their_default(tmp_path: Path) -> None:
    assert load_config(Run, written(tmp_path, "weights: {image: 0}")).weights == {"pose": 1.0, "image": 0.0}


def test_named_sections_merge_entry_by_entry_and_key_by_key(tmp_path: Path) -> None:
    written(tmp_path, "rows: {first: {kind: sgd, learning_rate: 2}, second: {}}", "base.yaml")
    path = written(tmp_path, "base: base.yaml\nrows: {first: {learning_rate: 3}, third: {kind: sgd}}")
    found = load_config(Table, path, ["rows.base.kind=sgd"]).rows
    assert found == {
        "base": Optimizer(learning_rate=0.5, kind="sgd"),
        "first": Optimizer(learning_rate=3, kind="sgd"),
        "second": Optimizer(),
        "third": Optimizer(kind="sgd"),
    }
    assert list(found) == ["base", "first", "second", "third"]
    table = Table(found)
    assert load_config(Table, written(tmp_path, dump_yaml(table))) == from_dict(Table, to_dict(table)) == table


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("rows: {a: {learning: 1}}", ": rows.a: unknown key 'learning'; did you mean 'learning_rate'?"),
        ("rows: {a: {kind: adm}}", ": rows.a.kind: must be one of 'adam', 'sgd'; got 'adm' (str)"),
        ("rows: {b: {}, a: {learning_rate: -1}}", ": rows.a: learning_rate must be > 0; got -1"),
        ("rows: {a: 3}", ": rows.a: must be a section of `key: value`; got 3"),
        ("rows: {a: }", ": rows.a: must be a section of `key: value`; got None"),
        ("rows: [a]", ": rows: must be a section of `name: ...`; got ['a']"),
        ("rows: {1: {}}", ": rows: must be a section of `name: ...`; got {1: {}}"),
    ],
)
def test_a_mistake_in_a_named_section_is_named_with_its_entry(tmp_path: Path, text: str, message: str) -> None:
    path = written(tmp_path, text)
    with pytest.raises(ConfigError) as caught:
        load_config(Table, path)
    assert str(caught.value).removeprefix(str(path)).startswith(message)


def test_named_sections_need_no_default() -> None:
    assert load_config(NeedsRows, overrides=["rows.a.kind=sgd"]).rows == {"a": Optimizer(kind="sgd")}


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "field: {optimizer: {lerning_rate: 1}}",
            ": field.optimizer: unknown key 'lerning_rate'; did you mean 'learning_rate'?",
        ),
        ("nmae: x", ": unknown key 'nmae'; did you mean 'name'?"),
        ("zzz: 1", ": unknown key 'zzz' (known: name, field, weights, second)"),
        ("field: {n_levels: many}", ": field.n_levels: must be a whole number; got 'many' (str)"),
        ("field: {n_levels: 1e1}", ": field.n_levels: must be a whole number; got 10.0 (float); write 10"),
        ("field: {n_levels: true}", ": field.n_levels: must be a whole number; got True (bool)"),
        ("field: {n_levels: 010}", ": field.n_levels: must be a whole number; got '010' (str)"),
        ("field: {aabb_m: '2'}", ": field.aabb_m: must be a number or null; got '2' (str)"),
        ("field: {is_shared: 1}", ": field.is_shared: must be true or false; got 1 (int)"),
        ("name: 3", ": name: must be text; got 3 (int); put it in quotes if text is meant"),
        ("field: 3", ": field: must be a section of `key: value`; got 3"),
        ("weights: {image: high}", ": weights: ['image'] must be a number; got 'high' (str)"),
        (
            "field: {optimizer: {kind: adm}}",
            ": field.optimizer.kind: must be one of 'adam', 'sgd'; got 'adm' (str); did you mean 'adam'?",
        ),
        ("field: {optimizer: {learning_rate: -1}}", ": field.optimizer: learning_rate must be > 0; got -1"),
        ("[1, 2]", ": must hold `key: value` lines at the top; got list"),
        ("name: a\nname: b", ": line 2: key 'name' was given before, in line 1; keep one of them"),
    ],
)
def test_a_mistake_is_named_with_its_place_and_its_mend(tmp_path: Path, text: str, message: str) -> None:
    assert error_of(tmp_path, text) == message


def test_text_that_is_not_yaml_names_its_line(tmp_path: Path) -> None:
    assert error_of(tmp_path, "name: a\nfield: [1, 2\n").startswith(": line 3: not valid YAML:")


def test_a_missing_file_is_named() -> None:
    with pytest.raises(ConfigError, match=r"nowhere\.yaml: cannot read this configuration: No such file"):
        load_config(Run, "nowhere.yaml")


def test_a_required_key_that_is_missing_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"missing key 'path'"):
        load_config(Needs, written(tmp_path, ""))
    assert load_config(Needs, overrides=["path=x"]).path == "x"


def test_later_layers_win_key_by_key(tmp_path: Path) -> None:
    written(tmp_path, "name: base\nfield: {n_levels: 1, layers: [1]}\nweights: {pose: 5}", "presets/base.yaml")
    first = written(tmp_path, "base: presets/base.yaml\nfield: {n_levels: 2}\nname: first")
    second = written(tmp_path, "name: second\nfield: {layers: [3, 3]}", "second.yaml")
    run = load_config(Run, [first, second], ["field.optimizer.learning_rate=1e-4", "weights.image=0.5"])
    assert run.name == "second"
    assert (run.field.n_levels, run.field.layers) == (2, (3, 3))
    assert run.field.optimizer.learning_rate == 1e-4
    assert run.weights == {"pose": 5.0, "image": 0.5}


def test_a_base_of_a_base_is_refused(tmp_path: Path) -> None:
    written(tmp_path, "name: x", "a.yaml")
    written(tmp_path, "base: a.yaml", "b.yaml")
    assert "has a base of its own; only one level is allowed" in error_of(tmp_path, "base: b.yaml")


def test_a_base_that_is_missing_is_named(tmp_path: Path) -> None:
    assert error_of(tmp_path, "base: gone.yaml").startswith(": base: no such file '")


def test_an_error_names_the_layer_that_made_it(tmp_path: Path) -> None:
    written(tmp_path, "field: {optimizer: {learning_rate: -1}}", "base.yaml")
    path = written(tmp_path, "base: base.yaml\nfield: {optimizer: {kind: sgd}}")
    with pytest.raises(ConfigError, match=r"base\.yaml: field\.optimizer: learning_rate must be > 0"):
        load_config(Run, path)
    with pytest.raises(
        ConfigError, match=r"^--set field\.optimizer\.learning_rate=-2: field\.optimizer: learning_rate"
    ):
        load_config(Run, path, ["field.optimizer.learning_rate=-2"])


def test_an_error_that_names_no_field_blames_the_layer_that_spoke_last(tmp_path: Path) -> None:
    first, second = written(tmp_path, "a: 1\nb: 1", "first.yaml"), written(tmp_path, "a: 2", "second.yaml")
    with pytest.raises(ConfigError, match=r"second\.yaml: the interval is empty"):
        load_config(Pair, [first, second])


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("name", "must look like section.key=value"),
        (".name=x", "must look like section.key=value"),
        ("field.n_level=3", "field: unknown key 'n_level'; did you mean 'n_levels'"),
        ("field.n_levels=x", "field.n_levels: must be a whole number; got 'x'"),
        ("name.first=x", "name: must be text; got {'first': 'x'}"),
        ("field=[1", "not valid YAML"),
    ],
)
def test_a_wrong_override_is_named(override: str, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(Run, overrides=[override])
    assert str(caught.value).startswith(f"--set {override}: ")
    assert message in str(caught.value)


def test_the_dumped_text_reads_back_to_an_equal_configuration(tmp_path: Path) -> None:
    run = load_config(Run, overrides=["field.aabb_m=1e-7", "second.kind=sgd", "name='no'", "field.layers=[]"])
    assert load_config(Run, written(tmp_path, dump_yaml(run))) == run
    assert from_dict(Run, to_dict(run)) == run


def test_from_dict_names_its_source() -> None:
    with pytest.raises(ConfigError, match=r"^scene\.map: unknown key 'nam'"):
        from_dict(Run, {"nam": "x"}, "scene.map")


def test_a_difference_is_a_dotted_path_with_both_values() -> None:
    old = load_config(Run)
    new = load_config(Run, overrides=["field.optimizer.betas=[0.5, 0.5]", "second.kind=sgd", "weights.rvs=1"])
    assert diff(old, old) == {}
    assert diff(old, to_dict(old)) == {}
    assert diff(old, new) == {
        "field.optimizer.betas": ([0.9, 0.99], [0.5, 0.5]),
        "weights.rvs": (None, 1.0),
        "second": (None, to_dict(Optimizer(kind="sgd"))),
    }
