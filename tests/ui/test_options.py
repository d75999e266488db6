from __future__ import annotations

import pytest

from kandinsky5.errors import UserError
from kandinsky5.ui.options import StudioOptions


def test_the_defaults_let_only_this_machine_in():
    options = StudioOptions()
    options.check()
    assert (options.bind_host, options.port, options.credentials) == ("127.0.0.1", 7860, None)


def test_listening_without_a_password_is_refused_with_the_reason():
    with pytest.raises(UserError, match=r"anyone on the network .* --auth USER:PASS") as caught:
        StudioOptions(listen=True).check()
    assert caught.value.exit_code == 2


def test_listening_with_a_password_opens_every_interface():
    options = StudioOptions(listen=True, auth="eva:a:b")
    options.check()
    assert options.bind_host == "0.0.0.0"
    assert options.credentials == ("eva", "a:b")


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.5", "example.org"])
def test_an_outside_address_needs_listen(host):
    with pytest.raises(UserError, match="--listen --auth"):
        StudioOptions(host=host).check()


@pytest.mark.parametrize("auth", ["eva", "eva:", ":secret", ""])
def test_half_a_password_is_refused_without_being_repeated(auth):
    with pytest.raises(UserError, match="USER:PASS") as caught:
        StudioOptions(listen=True, auth=auth).check()
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("port", [0, -1, 65536])
def test_impossible_ports_are_refused(port):
    with pytest.raises(UserError, match="1 to 65535"):
        StudioOptions(port=port).check()
