"""The only floor that imports ray: pipelines on Ray Data, fits on Ray Train, the gate on Ray Serve, sizing."""
