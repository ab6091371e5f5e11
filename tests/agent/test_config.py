"""What an agent keeps of itself: its id."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.config import SettingWrong, device_identity


def test_an_id_is_made_once(tmp_path: Path) -> None:
    made = device_identity(tmp_path / "state")
    assert device_identity(tmp_path / "state") == made


@pytest.mark.parametrize("content", [b"", bytes(17), b"0123456789abcdeX\n", b"\xff" * 16])
def test_a_damaged_id_is_never_replaced_in_silence(content: bytes, tmp_path: Path) -> None:
    """With another id, the device would be a stranger: its key, its name and its pins are lost."""
    (tmp_path / "device-id").write_bytes(content)
    with pytest.raises(SettingWrong, match=r"device-id is damaged: write this device's id"):
        device_identity(tmp_path)
    assert (tmp_path / "device-id").read_bytes() == content
