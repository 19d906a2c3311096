"""An RTSP server for tests: one stream at /stream, from a file or a test picture, as a camera would send it.

Runs with Debian's own Python, which has the bindings (`make services` installs them):

    /usr/bin/python3 tests/servers/rtsp_server.py --file clip.mp4 --port 8554
    /usr/bin/python3 tests/servers/rtsp_server.py --launch "videotestsrc is-live=true ! openh264enc"

Prints the port once it listens. The file is an .mp4 of H.264 or H.265 (--codec h265).
"""

import argparse

import gi

gi.require_version("Gst", "1.0")
gi.require_version("GstRtspServer", "1.0")
from gi.repository import Gio, GLib, Gst, GstRtspServer  # noqa: E402  (the versions must be chosen first)


def pipeline(args: argparse.Namespace) -> str:
    source = args.launch or f'filesrc location="{args.file}" ! qtdemux'
    # The parameter sets before every key frame, so that anybody can join. The payloader would put them before every
    # slice of one, which tears pictures apart.
    parse = f"{args.codec}parse config-interval=-1"
    return f"( {source} ! {parse} ! rtp{args.codec}pay name=pay0 pt=96 )"


def guard(server: GstRtspServer.RTSPServer, factory: GstRtspServer.RTSPMediaFactory, user: str, password: str) -> None:
    auth = GstRtspServer.RTSPAuth()
    token = GstRtspServer.RTSPToken()
    token.set_string("media.factory.role", "user")
    auth.add_basic(GstRtspServer.RTSPAuth.make_basic(user, password), token)
    server.set_auth(auth)
    rights = GstRtspServer.RTSPPermissions()
    rights.add_permission_for_role("user", "media.factory.access", True)
    rights.add_permission_for_role("user", "media.factory.construct", True)
    factory.set_permissions(rights)


def encrypt(server: GstRtspServer.RTSPServer, factory: GstRtspServer.RTSPMediaFactory, folder: str) -> None:
    """With cert.pem and key.pem of a folder, for anybody."""
    auth, token, rights = GstRtspServer.RTSPAuth(), GstRtspServer.RTSPToken(), GstRtspServer.RTSPPermissions()
    auth.set_tls_certificate(Gio.TlsCertificate.new_from_files(f"{folder}/cert.pem", f"{folder}/key.pem"))
    token.set_string("media.factory.role", "user")
    auth.set_default_token(token)
    for right in ("access", "construct"):
        rights.add_permission_for_role("user", f"media.factory.{right}", True)
    factory.set_permissions(rights)
    server.set_auth(auth)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", default="")
    parser.add_argument("--launch", default="")
    parser.add_argument("--codec", default="h264")
    parser.add_argument("--port", default="0")
    parser.add_argument("--user")
    parser.add_argument("--password", default="")
    parser.add_argument("--tls", help="folder with cert.pem and key.pem: rtsps instead of rtsp")
    parser.add_argument("--seconds", type=float, default=600, help="stop after this time, whatever happens")
    args = parser.parse_args()

    Gst.init(None)
    server = GstRtspServer.RTSPServer()
    server.set_address("127.0.0.1")
    server.set_service(args.port)
    factory = GstRtspServer.RTSPMediaFactory()
    factory.set_launch(pipeline(args))
    factory.set_shared(True)
    server.get_mount_points().add_factory("/stream", factory)
    if args.user:
        guard(server, factory, args.user, args.password)
    if args.tls:
        encrypt(server, factory, args.tls)
    loop = GLib.MainLoop()
    if not server.attach(None):
        raise SystemExit(f"port {args.port} is taken")
    print(server.get_bound_port(), flush=True)
    GLib.timeout_add(int(args.seconds * 1000), loop.quit)
    loop.run()


main()
