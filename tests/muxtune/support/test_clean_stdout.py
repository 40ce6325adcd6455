from __future__ import annotations

import subprocess
import sys


def test_what_a_child_process_prints_goes_to_stderr():
    script = (
        "import subprocess\n"
        "from muxtune.support.clean_stdout import stdout_kept_clean\n"
        "print('before')\n"
        "with stdout_kept_clean():\n"
        "    print('python')\n"
        "    subprocess.run(['echo', 'child'])\n"
        "print('after')\n"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.split() == ["before", "after"]
    assert sorted(done.stderr.split()) == ["child", "python"]
