"""Laws of choices written as text: what is written is read again, and what cannot be read is named."""

from collections.abc import Sequence

import pytest
from reference import refused

from diffusion import options, schedules
from diffusion.commands.samplers import OWN_LENGTH, SAMPLERS
from diffusion.guidance import RULES
from diffusion.objectives.choice import STUDENTS
from diffusion.objectives.losses import OBJECTIVES
from diffusion.objectives.weightings import WEIGHTINGS
from diffusion.timesteps import GRIDS

TABLES = (
    (SAMPLERS, 2),
    (GRIDS, 2),
    (OWN_LENGTH, 1),
    (schedules.SCHEDULES, 0),
    (OBJECTIVES, 4),
    (STUDENTS, 5),
    (WEIGHTINGS, 2),
)
EVERYTHING = [(table, leading, name) for table, leading in (*TABLES, (RULES, 2)) for name in table]


def example(number, count: int | Sequence[int] = 1, rate=0.5, flag=True, kind="a", sizes=(), limit=None):
    return count, rate, flag, kind, sizes, limit


KNOWN = {"example": example, "needs": lambda number, times: times}


@pytest.mark.parametrize(("table", "leading", "name"), EVERYTHING, ids=lambda v: v if isinstance(v, str) else "")
def test_every_name_of_the_library_can_be_written_and_is_itself_by_default(table, leading, name):
    choice = options.parse("choice", name, table, leading)
    assert choice == options.Choice(name, table[name], {})
    assert options.write(choice, leading) == name


@pytest.mark.parametrize(("table", "leading", "name"), EVERYTHING, ids=lambda v: v if isinstance(v, str) else "")
def test_every_default_written_out_is_read_as_itself(table, leading, name):
    for key, default in options.defaults(table[name], leading).items():
        if default in (options.REQUIRED, None, ()):
            continue
        text = ",".join(map(str, default)) if isinstance(default, tuple) else default
        choice = options.parse("choice", f"{name}:{key}={text}", table, leading)
        assert choice.options == {key: default}
        assert type(choice.options[key]) is type(default)
        assert options.write(choice, leading) == name


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("example:count=3", {"count": 3}),
        ("example:rate=3", {"rate": 3.0}),
        ("example:rate=-1e-3,flag=false", {"rate": -1e-3, "flag": False}),
        ("example:rate=inf", {"rate": float("inf")}),
        ("example:kind=b", {"kind": "b"}),
        ("example:sizes=1", {"sizes": (1,)}),
        ("example:sizes=1,2,3,kind=b", {"sizes": (1, 2, 3), "kind": "b"}),
        ("example:count=1,2,2", {"count": (1, 2, 2)}),
        ("example:limit=0.5", {"limit": 0.5}),
        ("needs:times=900,400.5,1", {"times": (900, 400.5, 1)}),
        ("needs:times=ddim25", {"times": "ddim25"}),
    ],
)
def test_options_are_read_as_the_type_of_their_default_and_written_as_they_were(text, wanted):
    choice = options.parse("choice", text, KNOWN, leading=1)
    assert choice.options == wanted
    assert {key: type(value) for key, value in choice.options.items()} == {k: type(v) for k, v in wanted.items()}
    assert options.parse("choice", options.write(choice, 1), KNOWN, leading=1) == choice


def test_writing_is_canonical():
    one, two = ("example:rate=0.25,count=2", "example:count=2,flag=true,rate=2.5e-1")
    assert {options.write(options.parse("c", text, KNOWN, 1), 1) for text in (one, two)} == {
        "example:count=2,rate=0.25"
    }


def test_what_is_missing_is_named():
    assert options.parse("choice", "needs", KNOWN, leading=1).missing(leading=1) == ["times"]
    assert options.parse("choice", "needs:times=1", KNOWN, leading=1).missing(leading=1) == []


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("exmple", "choice is 'exmple'; did you mean 'example'"),
        ("EXAMPLE", "did you mean 'example'"),
        ("", "choice is ''; valid: example, needs"),
        ("example:cuont=1", "choice example has no option 'cuont'; did you mean 'count'"),
        ("example:number=1", "has no option 'number'"),
        ("example:count", "option 'count' has no value; write example:count=VALUE"),
        ("example:3", "option '3' has no name; write example:count=3"),
        ("needs:1000,500", "option '1000' has no name; write needs:times=1000,500"),
        ("example:count=x", "example:count is 'x'; write a whole number"),
        ("example:count=1.5", "write a whole number"),
        ("example:rate=", "example:rate is ''; write a number"),
        ("example:flag=yes", "write true or false"),
        ("example:rate=1,2", "example:rate is '1,2'; write one number"),
        ("example:limit=1,2", "write one number"),
        ("example:count=1,count=2", "has its option 'count' twice"),
    ],
)
def test_what_cannot_be_read_is_named(text, message):
    with refused(message):
        options.parse("choice", text, KNOWN, leading=1)


def test_a_list_of_choices_is_split_where_a_name_begins():
    text = "ddim,unipc:order=1,2,2,1,variant=bh1,heun,explicit:times=900.5,-1,1e-3,./a.json,ddim:eta=0.5,4steps.json"
    names = ["ddim", "unipc:order=1,2,2,1,variant=bh1", "heun", "explicit:times=900.5,-1,1e-3", "./a.json"]
    assert options.split(text) == [*names, "ddim:eta=0.5", "4steps.json"]


def test_arguments_in_parentheses_stay_together():
    text = "ddim,A(x=1, y=[0,1]),unipc:order=3,variant=bh1"
    assert options.split(text) == ["ddim", "A(x=1, y=[0,1])", "unipc:order=3,variant=bh1"]
