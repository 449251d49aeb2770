"""The gate for the world: an ASGI application that judges an image and its mask, safe to expose. No Ray here.

    bytes --token, caps, time limits--> body --multipart or JSON--> fields --safe decoding--> image and mask
          --gathered for a few milliseconds--> one call of the gate --> verdict, audit line, metrics

`runtime/gate_http.py` puts it behind Ray Serve. Starlette and prometheus-client come with Ray Serve.
"""
