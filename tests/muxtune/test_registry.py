"""Registry: open to other packages, strict about names."""

from importlib.metadata import EntryPoint

import pytest

from muxtune import registry as registry_module
from muxtune.errors import MuxTuneError, UserError
from muxtune.registry import Registry


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


def test_a_plugin_that_takes_a_builtin_name_is_refused(registry, monkeypatch):
    point = EntryPoint("own", f"{__name__}:Plugin", registry.group)
    monkeypatch.setattr(registry_module, "entry_points", lambda group: [point])
    registry.add("own", 1)
    with pytest.raises(MuxTuneError, match="'own' is registered twice"):
        registry.names()
