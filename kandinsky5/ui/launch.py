"""From options to a running studio. gradio takes seconds to import: only once all is well."""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import TYPE_CHECKING

from kandinsky5.ui.listener import bind, shown_address
from kandinsky5.ui.options import StudioOptions

if TYPE_CHECKING:
    from kandinsky5.ui.settings import StudioSettings
    from kandinsky5.worker.client import WorkerClient


def launch(options: StudioOptions, *, announce: Callable[[str], None] = lambda line: None) -> int:
    """Run the studio until it is told to stop (Ctrl-C, SIGTERM).

    Args:
        options: checked here.
        announce: called with a line that holds the address, once nothing can be refused any more. Browsers
            may connect from then on; they wait until the page is there.

    Returns:
        The exit code, 0.

    Raises:
        UserError: the port is taken, another K1 uses the state folder, or the options would let strangers in.
    """
    options.check()
    listener = bind(options.bind_host, options.port)
    try:
        from kandinsky5.ui.settings import StudioSettings
        from kandinsky5.worker.client import WorkerClient

        settings = StudioSettings(options)
        client = WorkerClient(
            state_dir=options.state_dir,
            out_dir=settings.folders.out_dir,
            models_dirs=settings.folders.models_dirs,
            device=options.device,
        )
        client.use_folders(settings.folders)
        try:
            announce(f"opening the studio at {shown_address(listener)} (Ctrl-C ends it)")
            _serve(client, settings, listener)
        finally:
            client.close()
    finally:
        listener.close()
    return 0


def _serve(client: WorkerClient, settings: StudioSettings, listener: socket.socket) -> None:
    from kandinsky5.ui.app import studio_app
    from kandinsky5.ui.machine_notice import MachineNotice, doctor_command
    from kandinsky5.ui.server import StudioServer

    machine = MachineNotice(doctor_command(settings.folders, settings.options.state_dir))
    try:
        server = StudioServer(studio_app(client, settings.options, machine, settings))
        client.start()
        machine.start()
        with server.told_by_signals():
            server.run(sockets=[listener])
    finally:
        machine.stop()
