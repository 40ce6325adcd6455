"""Registry: open to other packages, strict about names."""

import sys
import warnings
from importlib.metadata import EntryPoint

import pytest

from muxtune.support import registry as registry_module
from muxtune.support.errors import MuxTuneError, UserError
from muxtune.support.registry import PluginError, Registry


@pytest.fixture
def registry():
    return Registry("policy", group="muxtune.tests.nothing-installed")


class Plugin:
    """What another package offers: a class, made into an instance on loading."""


PLUGIN_OBJECT = Plugin()


def test_the_decorator_registers_an_instance_and_returns_the_class(registry):
    @registry.register("mine")
    class Mine:
        pass

    assert isinstance(Mine, type)
    assert isinstance(registry.get("mine"), Mine)
    assert registry.get("mine") is registry.get("mine")


def test_names_are_sorted(registry):
    for name in ("b", "c", "a"):
        registry.add(name, name.upper())
    assert registry.names() == ["a", "b", "c"]
    assert registry.get("b") == "B"


def test_a_duplicate_is_our_bug_not_the_users(registry):
    registry.add("a", 1)
    with pytest.raises(MuxTuneError, match="the policy 'a' is registered twice") as caught:
        registry.add("a", 2)
    assert not isinstance(caught.value, UserError)
    assert registry.get("a") == 1


def test_a_class_defined_again_replaces_the_one_before(registry):
    def cell(answer):
        @registry.register("mine")
        class Mine:
            value = answer

        return Mine

    cell(1)
    cell(2)
    assert registry.get("mine").value == 2
    with pytest.raises(MuxTuneError, match="'mine' is registered twice"):

        @registry.register("mine")
        class Other:
            pass


def test_an_unknown_name_is_the_users_mistake(registry):
    registry.add("sl-peft", 1)
    with pytest.raises(UserError, match="no policy named 'slpeft'; did you mean 'sl-peft'"):
        registry.get("slpeft")


def test_plugins_come_in_by_entry_point_once_and_as_instances(registry, monkeypatch):
    asked = []

    def entry_points(*, group):
        asked.append(group)
        here = __name__
        return [EntryPoint("cls", f"{here}:Plugin", group), EntryPoint("obj", f"{here}:PLUGIN_OBJECT", group)]

    monkeypatch.setattr(registry_module, "entry_points", entry_points)
    registry.add("own", 1)
    assert registry.names() == ["cls", "obj", "own"]
    assert isinstance(registry.get("cls"), Plugin)
    assert registry.get("obj") is PLUGIN_OBJECT
    assert asked == [registry.group]


def test_a_plugin_that_takes_a_builtin_name_is_left_out_and_named(registry, monkeypatch):
    point = EntryPoint("own", f"{__name__}:Plugin", registry.group)
    monkeypatch.setattr(registry_module, "entry_points", lambda group: [point])
    registry.add("own", 1)
    with pytest.warns(UserWarning, match=rf"entry point {__name__}:Plugin.*'own' is registered twice"):
        assert registry.names() == ["own"]
    assert registry.get("own") == 1
    assert [fault.name for fault in registry.faults()] == ["own"]


class NeedsArgument:
    def __init__(self, beta):
        self.beta = beta


class Leaves:
    def __init__(self):
        sys.exit(3)


class Mute:
    """Has no summary."""

    def propose(self):
        pass


class Silent(Mute):
    summary = "  \n"


class Speaks(Mute):
    summary = "a policy"

    def __init__(self):
        print("loaded")


class Idle:
    summary = "has nothing to do"


@pytest.fixture
def strict():
    return Registry("policy", group="muxtune.tests.strict", methods=("propose",), summary=True)


def offer(monkeypatch, registry, **points):
    """Let packages register these, whose modules are this one unless they say so."""
    found = [
        EntryPoint(name.replace("_", "-"), value if ":" in value else f"{__name__}:{value}", registry.group)
        for name, value in points.items()
    ]
    monkeypatch.setattr(registry_module, "entry_points", lambda group: found)


@pytest.mark.parametrize(
    ("value", "reason"),
    [
        ("no_such_module:P", "loading it raised ModuleNotFoundError: No module named 'no_such_module'"),
        ("NoSuchClass", "loading it raised AttributeError"),
        ("NeedsArgument", "loading it raised TypeError: .*'beta'"),
        ("Leaves", "loading it raised SystemExit: 3"),
        ("Mute", "summary = None: expected a line that describes the policy"),
        ("Silent", "summary = ' .*': expected a line that describes the policy"),
        ("Idle", "Idle has no method propose"),
    ],
)
def test_a_plugin_that_does_not_work_costs_itself_alone(strict, monkeypatch, value, reason):
    offer(monkeypatch, strict, bad=value, good="Speaks")
    strict.add("own", 1)
    assert strict.get("own") == 1
    assert isinstance(strict.get("good"), Speaks)
    with pytest.warns(UserWarning, match=rf"the policy 'bad' of .*entry point .*{reason}.*; it is left out"):
        assert strict.names() == ["good", "own"]
    with pytest.raises(PluginError, match=reason) as caught:
        strict.get("bad")
    assert isinstance(caught.value, UserError)
    assert "\n" not in str(caught.value)
    assert [fault.name for fault in strict.faults()] == ["bad"]


def test_a_plugin_is_loaded_when_it_is_asked_for(strict, monkeypatch, capsys):
    offer(monkeypatch, strict, bad="no_such_module:P", good="Speaks")
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # nobody asked for the bad one
        strict.get("good")
    printed = capsys.readouterr()
    assert (printed.out, printed.err) == ("", "loaded\n")  # stdout is the command's
    assert strict.origin("good") == f"an unnamed package (entry point {__name__}:Speaks)"


def test_two_packages_with_one_name_are_both_left_out(strict, monkeypatch):
    points = [EntryPoint("twice", f"{__name__}:{name}", strict.group) for name in ("Speaks", "Idle")]
    monkeypatch.setattr(registry_module, "entry_points", lambda group: points)
    with pytest.raises(PluginError, match=r"Speaks.* and .*Idle.* both register it"):
        strict.get("twice")


@pytest.mark.parametrize("name", ["../x", "a b", "", "a\x1b[31m"])
def test_a_name_that_no_file_can_have_is_left_out(strict, monkeypatch, name):
    point = EntryPoint(name, f"{__name__}:Speaks", strict.group)
    monkeypatch.setattr(registry_module, "entry_points", lambda group: [point])
    with pytest.warns(UserWarning, match="expected a name of letters"):
        assert strict.names() == []


def test_a_list_of_entry_points_that_cannot_be_read_costs_its_package_alone(tmp_path, monkeypatch):
    for package, line in (("bad", "no equals sign"), ("good", f"good = {__name__}:Plugin")):
        folder = tmp_path / package / f"{package}-0.1.dist-info"
        folder.mkdir(parents=True)
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.1\n")
        (folder / "entry_points.txt").write_text(f"[x.y]\n{line}\n")
        monkeypatch.syspath_prepend(str(tmp_path / package))
    registry = Registry("thing", group="x.y")
    with pytest.warns(UserWarning, match=r"entry_points\.txt of bad cannot be read"):
        assert registry.names() == ["good"]
    assert registry.origin("good") == f"good 0.1 (entry point {__name__}:Plugin)"
