#!/bin/bash
# lays the package out by links, so that PYTHONPATH=build/typed finds this tree (run again after adding a file)
cd "$(dirname "$0")"; rm -rf build/typed; mkdir -p build/typed/edgeprune
for f in edgeprune/*; do ln -s "$PWD/$f" build/typed/edgeprune/; done
for d in export runtimes profiles; do ln -s "$PWD/$d" build/typed/edgeprune/$d; done
