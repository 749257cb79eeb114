"""An emulator of Google Cloud Storage: python tests/bucket.py PORT. It ends when its stdin is closed.

It has one empty bucket, gs://bucket, in memory. With the variables of `environment`, gcsfs, tensorstore, tensorboardX
and array_record of other processes use it. This file adds to the emulator package what tensorstore needs.
"""

import sys
import time
from types import SimpleNamespace


def environment(port):
    at = f"http://127.0.0.1:{port}"
    return dict(
        STORAGE_EMULATOR_HOST=at,
        TENSORSTORE_GCS_HTTP_URL=at,
        CLOUD_STORAGE_EMULATOR_ENDPOINT=at,
        GOOGLE_CLOUD_PROJECT="none",
        GCE_METADATA_ROOT="127.0.0.1:9",  # nothing answers there, so no time is lost looking for a real account
        NO_GCE_CHECK="true",
    )


def serve(port):
    from gcp_storage_emulator.handlers import objects

    given = objects.download

    def download(request, response, storage):
        """Adds the header that tells tensorstore the version of an object."""
        try:
            found = storage.get_file_obj(request.params["bucket_name"], request.params["object_id"])
            response["X-Goog-Generation"] = found["generation"]
        except objects.NotFound:
            pass
        given(request, response, storage)

    def move(request, response, storage):
        request.params["dest_bucket_name"] = request.params["bucket_name"]
        objects.copy(request, response, storage)
        objects.delete(request, response, storage)

    # Versions count microseconds, as the real ones do. Tensorstore rejects numbers over 2**60.
    objects.download, objects.time = download, SimpleNamespace(time_ns=lambda: time.time_ns() // 1000)
    from gcp_storage_emulator import server  # after the changes above, because it copies the functions into a table

    moves = r"^/storage/v1/b/(?P<bucket_name>\w+)/o/(?P<object_id>.+)/moveTo/o/(?P<dest_object_id>.+)$"
    server.HANDLERS = ((moves, {"POST": move}), *server.HANDLERS)
    running = server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    running.start()
    print("ready", flush=True)
    sys.stdin.read()
    running.stop()


if __name__ == "__main__":
    serve(int(sys.argv[1]))
