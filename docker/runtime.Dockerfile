# The thin runtime: makes pictures from a bundle on the CPU, with no torch inside.
#   docker build -f docker/runtime.Dockerfile -t ldm-export-runtime .
#   docker run --rm -v "$PWD/build/shapes:/bundle:ro" -v "$PWD/build:/out" ldm-export-runtime \
#       generate /bundle "a large red circle in the center on a white background" -o /out/picture.png
FROM python:3.11-slim-bookworm AS wheel
WORKDIR /source
COPY pyproject.toml README.md LICENSE constraints.txt ./
COPY export export
COPY runtime runtime
COPY calibration calibration
RUN python -m pip wheel --no-cache-dir --no-deps --wheel-dir /wheels .

FROM python:3.11-slim-bookworm
COPY --from=wheel /wheels /wheels
COPY constraints.txt /tmp/constraints.txt
RUN python -m pip install --no-cache-dir --constraint /tmp/constraints.txt "$(ls /wheels/*.whl)[onnxruntime]" \
    && rm -rf /wheels /tmp/constraints.txt \
    && useradd --create-home --uid 10001 ldm
USER ldm
WORKDIR /home/ldm
ENTRYPOINT ["ldm-export"]
CMD ["--help"]
