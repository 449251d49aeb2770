"""What is measured: pure functions on arrays (numpy, scipy, OpenCV). No torch, no tables, no Ray."""
