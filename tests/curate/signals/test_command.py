"""`command:...`: what a checker's reply means, and hostile checkers, each stopped, marked, and gone without a trace."""

import datetime
import os
import sys
import tempfile

import psutil
import pytest

from dpo_fast.config import SignalConfig
from dpo_fast.curate.signals.registry import parse_signals
from dpo_fast.curate.verdict import Question
from dpo_fast.curate.workers.pool import judge_texts
from dpo_fast.errors import UserError

pytestmark = pytest.mark.slow

PRELUDE = """
import json, os, signal, sys, time
answer = sys.stdin.read()
if answer != "evil":
    print(1)
    sys.exit()
"""


@pytest.fixture
def checker(tmp_path, monkeypatch):
    """Runs a script as the checker of answers; afterwards no process of it may run, and no file be left."""
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    script = tmp_path / "checker.py"

    def run(code, answers=("good", "evil", "good"), *, row=None, command=None, **limits):
        script.write_text(code)
        command = command or f"{sys.executable} -S {script}"
        limits = {"timeout": 5.0, "num_workers": 1, "allow_commands": True} | limits
        config = SignalConfig(signals=[f"command:{command}"], **limits)
        questions = {0: Question(row or {}, "", list(answers))}
        [(number, [verdicts])] = judge_texts(questions, parse_signals(config), config)
        assert number == 0
        return verdicts

    yield run
    left = [p.pid for p in psutil.process_iter(["cmdline"]) if str(script) in (p.info["cmdline"] or [])]
    for pid in left:
        os.kill(pid, 9)
    assert not left
    assert list(scratch.iterdir()) == []


def run_evil(checker, code, **limits):
    """The reason that an evil answer's row is given, where the answers around it are judged as ever."""
    first, evil, last = checker(PRELUDE + code, **limits)
    assert first == last == (1.0, None)
    assert evil.score is None
    return evil.reason


@pytest.mark.parametrize(
    ("code", "score"),
    [
        ("print(0.25)", 0.25),
        ("print('checking'); print(' -3e2 '); print()", -300.0),
        ("", 1.0),
        ("print('all is well')", 1.0),
        ("raise SystemExit(1)", 0.0),
        ("raise SystemExit(7)", 0.0),
        ("print(0.5); raise SystemExit(1)", 0.5),
        ("raise ValueError('no')", 0.0),
        ("import sys; print(3, file=sys.stderr)", 1.0),
    ],
)
def test_the_last_line_is_the_score_or_else_the_exit_code(checker, code, score):
    assert checker(code, ["x"]) == [(score, None)]


@pytest.mark.parametrize("word", ["nan", "inf"])
def test_a_number_that_is_none_is_no_score(checker, word):
    [verdict] = checker(f"print('{word}')", ["x"])
    assert verdict.score is None
    assert verdict.reason == f"the score is {word}; expected a finite number"


ECHO = """
import json, os, pathlib, sys
text = sys.stdin.buffer.read()
same = text == pathlib.Path("answer.txt").read_bytes() and json.load(open("row.json"))["gold"] == [1, "é"]
alone = os.environ["HOME"] == os.environ["TMPDIR"] == os.getcwd() and len(os.listdir()) == 2
print(len(text) if same and alone and "SECRET" not in os.environ else -1)
"""


def test_a_checker_gets_answer_and_row_in_a_folder_of_its_own(checker, monkeypatch):
    monkeypatch.setenv("SECRET", "token")
    answers = ["", "é", "<script>\0", "a" * 10_000_000, "\ud800", "x\r\ny"]
    lengths = [len(answer.encode(errors="replace")) for answer in answers]
    verdicts = checker(ECHO, answers, row={"gold": [1, "é"], "responses": answers})
    assert [verdict.score for verdict in verdicts] == lengths


def test_words_are_split_as_a_shell_does_but_no_shell_reads_them(checker, tmp_path, monkeypatch):
    code = "import sys\nraise SystemExit(sys.argv[1:] != ['a b', '$HOME', '*', ';', 'true'])"
    command = f"{sys.executable} checker.py 'a b' $HOME * ; true"
    # The name of a file here is given as its whole path, since the checker runs elsewhere.
    monkeypatch.chdir(tmp_path)
    (tmp_path / "checker.py").touch()
    assert checker(code, ["x"], command=command) == [(1.0, None)]


def test_a_checker_that_hangs(checker):
    assert run_evil(checker, "time.sleep(600)", timeout=1.0) == "took longer than 1 s"


def test_a_checker_that_ignores_signals(checker):
    code = "[signal.signal(s, signal.SIG_IGN) for s in (1, 2, 15, 24)]\nwhile True: pass"
    assert run_evil(checker, code, timeout=1.0) == "took longer than 1 s"


DETACH = """
def detach():
    if os.fork() == 0:
        os.setsid()
        if os.fork() == 0:
            [os.close(fd) for fd in range(3)]
            os.environ.clear()
            signal.signal(15, signal.SIG_IGN)
            time.sleep(600)
        os._exit(0)
detach()
"""


def test_a_checker_that_leaves_a_detached_child(checker):
    assert run_evil(checker, DETACH) == "left processes running when it ended"


def test_a_checker_that_hangs_beside_a_detached_child(checker):
    assert run_evil(checker, DETACH + "time.sleep(600)", timeout=1.0) == "took longer than 1 s"


def test_a_child_that_holds_the_pipes_open(checker):
    code = "if os.fork() == 0: time.sleep(600)\nprint(1)"
    assert run_evil(checker, code) == "left processes running when it ended"


def test_a_child_that_ends_a_moment_later_is_forgiven(checker):
    code = "import os, time\nif os.fork() == 0: time.sleep(0.05); os._exit(0)\nprint(4)"
    assert checker(code, ["x"]) == [(4.0, None)]


def test_a_checker_that_forks_and_forks(checker):
    code = "for _ in range(200):\n    if os.fork() == 0: time.sleep(600)\ntime.sleep(600)"
    assert run_evil(checker, code, process_limit=20) == "ran more than 20 processes at once"


def test_a_chain_of_forks(checker):
    # Each lives for a moment alone, in a process group that none before it was in.
    code = "for _ in range(200):\n    if os.fork(): time.sleep(0.01); os._exit(0)\n    os.setpgid(0, 0)\n"
    code += "time.sleep(600)"
    assert run_evil(checker, code) == "left processes running when it ended"


@pytest.mark.parametrize("prefix", ["", "signal.signal(signal.SIGXFSZ, signal.SIG_DFL)\n"])
def test_a_checker_that_writes_a_large_file(checker, prefix):
    code = prefix + "with open('f', 'wb', 0) as f:\n    for _ in range(1000): f.write(bytes(2**20))"
    assert run_evil(checker, code, file_limit_mib=8) == "wrote more than 8 MiB of files"


def test_a_checker_that_writes_many_files(checker):
    code = "os.mkdir('d')\nfor n in range(100_000): open(f'd/{n}', 'w').close()"
    assert run_evil(checker, code, file_limit_mib=8) == "wrote more than 8 MiB of files"


def test_files_that_are_hard_to_remove(checker):
    code = "for _ in range(3000):\n    os.mkdir('d'); os.chdir('d')\nos.chmod('.', 0)"
    assert run_evil(checker, code) == "wrote more than 64 MiB of files"


@pytest.mark.parametrize("descriptor", [1, 2])
def test_a_checker_that_prints_a_gigabyte(checker, descriptor):
    code = f"for _ in range(1024): os.write({descriptor}, b'x' * 2**20)"
    assert run_evil(checker, code, output_limit_kib=100) == "printed more than 100 KiB"


def test_all_that_was_printed_is_read(checker):
    assert checker("print('x' * 900_000); print(5)", ["x"]) == [(5.0, None)]


def test_a_checker_that_eats_memory(checker):
    code = "blocks = []\nfor _ in range(400): blocks.append(b'x' * 10_000_000)"
    assert run_evil(checker, code, memory_limit_mib=100) == "used more than 100 MiB of memory"


def test_a_checker_that_asks_for_more_memory_than_there_is_fails_by_itself(checker):
    assert checker(PRELUDE + "bytearray(10**12)", memory_limit_mib=100)[1] == (0.0, None)


def test_checkers_that_eat_memory_together(checker):
    code = "[os.fork() for _ in range(2)]\nblock = b'x' * 60_000_000\ntime.sleep(600)"
    assert run_evil(checker, code, memory_limit_mib=100) == "used more than 100 MiB of memory"


def test_a_checker_that_crashes(checker):
    assert run_evil(checker, "os.kill(os.getpid(), signal.SIGSEGV)") == "ended by signal 11 (Segmentation fault)"


def test_a_checker_that_kills_who_started_it(checker):
    code = "if os.fork() == 0: time.sleep(600)\nos.kill(os.getppid(), signal.SIGKILL)\ntime.sleep(600)"
    assert run_evil(checker, code) == "ended the process that judged it (signal 9, Killed)"


def test_a_checker_that_stops_who_started_it(checker):
    code = "os.kill(os.getppid(), signal.SIGSTOP)\ntime.sleep(600)"
    assert run_evil(checker, code, timeout=0.5) == "took longer than 0.5 s and was killed"


def test_commands_are_off_unless_allowed():
    with pytest.raises(UserError, match="allow it with --allow_commands true"):
        parse_signals(SignalConfig(signals="command:true"))


@pytest.mark.parametrize(
    ("command", "message"),
    [("", "expected command:PROGRAM"), ("'a", "cannot be split"), ("no-such-program-here x", "no program")],
)
def test_a_command_that_cannot_run_is_refused_at_the_start(command, message):
    with pytest.raises(UserError, match=message):
        parse_signals(SignalConfig(signals=f"command:{command}", allow_commands=True))


def test_a_row_that_json_cannot_hold_is_written_as_text(checker):
    code = "import json; raise SystemExit(json.load(open('row.json'))['when'] != '2020-01-01')"
    assert checker(code, ["x"], row={"when": datetime.date(2020, 1, 1)}) == [(1.0, None)]
