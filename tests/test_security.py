"""The statements of SECURITY.md about the code, checked against its syntax tree."""

import ast

import pytest
import yaml
from support.folders import ROOT

from promcse_pl.sweeps import collect

SOURCES = [
    *sorted((ROOT / "promcse_pl").rglob("*.py")),
    *sorted((ROOT / "hydra_plugins").rglob("*.py")),
    ROOT / "run.py",
]

PICKLE_CHANNELS = (
    "recv",  # multiprocessing.connection.Connection
    "all_gather_object",
    "gather_object",
    "broadcast_object_list",
    "scatter_object_list",
    "recv_object_list",
    "Unpickler",
    "ProcessPoolExecutor",
)
"""Functions that unpickle what another process sends."""

ALLOWED_CHANNELS = {
    ("distributed.py", "all_gather_object"),  # between the ranks of one run
}


def calls() -> list[tuple[str, str, dict[str, object]]]:
    """(file, dotted name, keywords that are constants) of every call in the package."""
    found = []
    for path in SOURCES:
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                constants = {word.arg: getattr(word.value, "value", ...) for word in node.keywords if word.arg}
                found.append((path.name, ast.unparse(node.func), constants))
    return found


CALLS = calls()


def test_every_model_and_tokenizer_is_read_without_remote_code_and_weights_only_as_safetensors():
    loads = [call for call in CALLS if call[1].endswith(".from_pretrained") and call[1] != "PromCSE.from_pretrained"]
    assert {name.partition(".")[0] for _, name, _ in loads} >= {"auto_class(config)", "AutoConfig", "AutoTokenizer"}
    for file, name, constants in loads:
        assert constants.get("trust_remote_code") is False, (file, name)
        if name in ("AutoModel.from_pretrained", "auto_class(config).from_pretrained"):
            assert constants.get("use_safetensors") is True, file


def test_torch_load_takes_tensors_alone():
    loads = [call for call in CALLS if call[1] == "torch.load"]
    assert loads
    assert all(constants.get("weights_only") is True for _, _, constants in loads)


@pytest.mark.parametrize(
    "name", ["eval", "exec", "pickle.load", "pickle.loads", "yaml.unsafe_load", "os.system", "joblib.load"]
)
def test_nothing_that_runs_what_it_reads_is_called(name):
    assert not [call for call in CALLS if call[1] == name]


def test_objects_are_unpickled_only_between_processes_of_one_run():
    channels = {(file, name.rpartition(".")[2]) for file, name, _ in CALLS}
    assert {(file, name) for file, name in channels if name in PICKLE_CHANNELS} <= ALLOWED_CHANNELS


def test_the_scan_covers_the_hydra_plugin():
    assert {"promcse_sweeper.py", "run.py", "launcher.py"} <= {path.name for path in SOURCES}


def test_yaml_is_read_by_loaders_that_make_plain_values_alone():
    assert {file for file, name, _ in CALLS if name == "yaml.load"} == {"collect.py"}
    for size in (1, 2 * collect._SHORT):  # the loader in C, and the other one
        with pytest.raises(yaml.constructor.ConstructorError, match="python/object"):
            collect._load_yaml(f"a: !!python/object/apply:os.getcwd []\nb: {'x' * size}")


def test_numpy_reads_no_pickle_and_no_process_goes_through_a_shell():
    assert all(
        constants.get("allow_pickle", False) is False for _, name, constants in CALLS if name.endswith("np.load")
    )
    assert all(constants.get("shell", False) is False for _, name, constants in CALLS if name.startswith("subprocess."))


def test_the_security_page_states_these_guarantees():
    page = (ROOT / "SECURITY.md").read_text(encoding="utf-8")
    for words in (
        "`use_safetensors=True`",
        "`trust_remote_code` is off",
        "weights_only=True",
        "requirements-release.txt",
        "Report",
        "`all_gather_object`",
    ):
        assert words in page
