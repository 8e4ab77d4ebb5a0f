import importlib.util
import sys
from pathlib import Path

import pytest

from megatron_apt import scripts

TOOLS = Path(__file__).parents[2] / "tools"


@pytest.fixture
def script(monkeypatch, capsys):
    """script(name, *arguments) -> (exit code, what it says) of a file under tools/, in this process."""

    def ran(name, *arguments):
        file = TOOLS / f"{name}.py"
        monkeypatch.setattr(sys, "argv", [str(file), *map(str, arguments)])
        monkeypatch.syspath_prepend(str(TOOLS))
        spec = importlib.util.spec_from_file_location(f"script_{file.stem}", file)
        module = importlib.util.module_from_spec(spec)
        monkeypatch.setitem(sys.modules, spec.name, module)
        spec.loader.exec_module(module)
        with pytest.raises(SystemExit) as ended:
            scripts.run(module.main)
        code, said = ended.value.code, capsys.readouterr()
        return (1, code) if isinstance(code, str) else (code, said.out + said.err)

    return ran
