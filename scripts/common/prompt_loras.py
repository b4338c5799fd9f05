"""LoRA files that prompts name, `<lora:style:0.8>`: looked up in a folder, and merged for that prompt."""

from __future__ import annotations

import difflib
import re
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import sd
from sd.adapters.adapter_files import lora_name
from sd.adapters.added import LoraFile
from sd.checkpoints.folders import ENDINGS
from sd.files import folders_below
from sd.messages import listed, one_line, printable
from sd.params import TextToImage
from sd.request_texts import all_texts
from sd.text.prompt_tags import Tag, lora_weight, tag_name, take_loras

MAX_FILES = 100_000  # looked at: more is not a folder of LoRA files
LISTED = 5  # files or names in an error message at most


def check_folder(folder: Path) -> None:
    """Raise ValueError if --lora-dir is not a folder."""
    if not folder.is_dir():
        raise ValueError(f"--lora-dir {folder}: {'not a folder' if folder.exists() else 'no such folder'}")


class LoraFolder:
    """The LoRA files of a folder and the folders in it.

    A file is found by its name (`tag_name`), in upper or lower case, also with the folders in which it is: `sub/style`.
    A name from a prompt is only compared with those that are there, and never used as a path. Raises ValueError for
    what is not a folder, or has more than 100,000 files.
    """

    def __init__(self, folder: Path) -> None:
        check_folder(folder)
        self._folder = folder
        self._found: dict[str, list[Path]] = {}  # by name in lower case
        count = 0
        for path, _, files in folders_below(folder):
            count += len(files)
            if count > MAX_FILES:
                raise ValueError(f"--lora-dir {folder}: more than {MAX_FILES:,} files in it")
            for file in map(path.joinpath, files):
                if file.suffix.lower() in ENDINGS:
                    self._found.setdefault(tag_name(lora_name(file)).casefold(), []).append(file)

    def files(self, name: str) -> list[Path]:
        """All files of a name, which may have folders before it."""
        if files := self._found.get(tag_name(name).casefold(), []):
            return files
        *folders, last = re.split(r"[/\\]", tag_name(name).casefold())
        files = self._found.get(last, [])
        return [file for file in files if self._folders(file)[-len(folders) :] == folders]

    def _folders(self, file: Path) -> list[str]:
        """The folders between this one and a file."""
        return [tag_name(part).casefold() for part in file.parent.relative_to(self._folder).parts]

    def find(self, name: str) -> Path:
        """The file of a name. Raises ValueError if there is none, or several."""
        files = self.files(name)
        if not files:
            near = difflib.get_close_matches(re.split(r"[/\\]", name.casefold())[-1][:200], self._found, n=LISTED)
            names = [printable(self._found[key][0].stem) for key in near]
            hint = f": did you mean {' or '.join(names)}?" if names else f", which has {len(self._found)}"
            raise ValueError(f"no LoRA file named '{one_line(name)}' is in {self._folder}{hint}")
        if len(files) > 1:
            several = printable(listed((file.relative_to(self._folder) for file in files), most=LISTED))
            whole = ["/".join([*self._folders(file), tag_name(lora_name(file))]) for file in files]
            named = [tag for tag in whole if len(self.files(tag)) == 1]
            or_name = f", or name the folder as well: <lora:{one_line(named[0])}:1>" if named else ""
            raise ValueError(
                f"{len(files)} files in {self._folder} are named {one_line(name)}: {several}; "
                f"rename all but one{or_name}"
            )
        return files[0]


class NamedLora(NamedTuple):
    """A LoRA file that a prompt names, and its weight."""

    name: str  # as the prompt writes it
    path: Path
    weight: float

    def plus(self, weight: float) -> NamedLora:
        """The same with more weight."""
        return self._replace(weight=self.weight + weight)


class PromptLoras:
    """The LoRA files that prompts name, all looked up before the model is loaded."""

    def __init__(self, folder: Path | None) -> None:
        self._folder = folder
        self._files: LoraFolder | None = None  # read when the first one is looked up
        self._loras: dict[object, list[NamedLora]] = {}  # by prompt
        self._current: list[NamedLora] = []
        self._merged: list[str] = []  # the names under which the model has them

    def look_up(self, request: TextToImage) -> None:
        """Find the files that the prompts of a request name, that of the second text encoder included.

        A prompt has tags if it is one of `web_ui_prompts`; otherwise, a tag is refused. Raises ValueError for a tag
        without a folder, a name that is not in it or is that of several files, and a wrong weight.
        """
        found: dict[Path, NamedLora] = {}
        for tag in self._tags(request, self._folder):
            if self._files is None:
                assert self._folder is not None
                self._files = LoraFolder(self._folder)
            path, weight = self._files.find(tag.name), lora_weight(tag)
            before = found.get(path)  # one that is named twice
            found[path] = NamedLora(tag.name, path, weight) if before is None else before.plus(weight)
        self._loras[request.prompt, request.prompt_2] = [*found.values()]

    def _tags(self, request: TextToImage, folder: Path | None) -> list[Tag]:
        """The tags in the prompt of a request, after checking that they can be used, and those in the negative one."""
        prompts, negatives = all_texts(request)
        for text in (*prompts, *negatives):
            web_ui = request.web_ui_prompts
            for tag in take_loras(text if web_ui else text.replace("#", " "))[1]:  # "#" begins a comment
                if not tag.name:
                    raise ValueError(
                        f"{tag.short} in the prompt: the name of the LoRA file is missing: write <lora:NAME:1>"
                    )
                if not web_ui:
                    file = f"{tag.name}.safetensors" + "".join(f":{value}" for value in tag.values[1:2])
                    raise ValueError(
                        f"{tag.short} in the prompt: give the file instead, for example --lora {file:.100}, or its "
                        "folder with --web-ui-prompts --lora-dir DIR"
                    )
                if folder is None:
                    raise ValueError(f"{tag.short} in the prompt: give the folder of the file with --lora-dir")
        for tag in [tag for text in negatives for tag in take_loras(text)[1]]:
            warnings.warn(
                f"{tag.short} in the negative prompt is left out, as in the web UI: a LoRA changes the whole model; "
                "to steer away from it, name it in the prompt with a negative weight",
                stacklevel=1,
            )
        return [tag for text in prompts for tag in take_loras(text)[1]] if request.web_ui_prompts else []

    @property
    def paths(self) -> list[Path]:
        """All files that are named."""
        return list(dict.fromkeys(lora.path for loras in self._loras.values() for lora in loras))

    @property
    def current(self) -> list[NamedLora]:
        """Those that are merged now."""
        return self._current

    def of(self, request: TextToImage) -> list[NamedLora]:
        """Those that the prompt of a request names."""
        if (request.prompt, request.prompt_2) not in self._loras:  # its second prompt was left out: like.fitted
            self.look_up(request)
        return self._loras[request.prompt, request.prompt_2]

    def merge(self, model: sd.StableDiffusion, request: TextToImage) -> None:
        """Merge the LoRAs of a request, print them, and remove those of the one before."""
        wanted = self.of(request)
        if wanted == self._current:
            return
        if self._merged:
            model.remove_lora(*self._merged)
        self._current, self._merged = [], []
        files = [LoraFile(lora.path, lora.weight) for lora in wanted]
        self._merged = merge_loras(model, files, [printable(lora.name) for lora in wanted])
        self._current = wanted


def merge_loras(
    model: sd.StableDiffusion, files: Sequence[LoraFile], names: Sequence[str] = (), *, removable: bool = True
) -> list[str]:
    """Merge LoRAs and print them, with the default settings that one for few steps brings; returns their names.

    names   to print them under; by default those that the model gives them
    """
    notes: list[str] = []
    merged = model.add_loras(files, removable=removable, note=notes.append)
    for name, printed, file in zip(merged, names or merged, files, strict=True):
        print(f"LoRA {printed}, weight {file.weight:g}", flush=True)
        kind = model.few_step_loras.get(name)
        if kind is not None and kind.introduced(name) in notes:
            notes.remove(kind.introduced(name))
            print(printable(kind.introduced(printed)), flush=True)
    for text in notes:
        warnings.warn(text, stacklevel=2)
    return merged
