"""Finished networks outside the lab: pictures in and out, exporters, latency, model cards."""
