"""What the demo prints."""

from dpo_fast.cli import make_parser, normalize
from dpo_fast.config import SampleConfig
from dpo_fast.demo.show import command_line


def test_a_stage_is_shown_as_a_command_that_does_the_same():
    config = SampleConfig(model="a b", data="d.jsonl", out="o.jsonl", temperature=[0.5, 1.0], num_samples=4)
    import shlex

    words = shlex.split(command_line("sample", config))
    assert words[:2] == ["dpo-fast", "sample"]
    parsed = make_parser().parse_args(normalize(words[1:]))["sample"].as_dict()
    parsed.pop("config", None)
    assert SampleConfig(**parsed) == config
