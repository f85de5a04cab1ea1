# The architectures that the CUDA kernels are compiled for: RNNKERN_CUDA_ARCHS, as CMake's CUDA_ARCHITECTURES.
#
# Left as it is where it is set, unless to `wheels`; otherwise the GPUs of this machine, as far as CMAKE_CUDA_COMPILER
# knows them. 80 alone is sm_80, which all 8.x run, and its PTX for all that come later: nvcc makes that on the way to
# sm_80, where PTX for 9.0 would take three tenths of its time and differ in nothing but how bfloat16 is widened.
# tests/test_build.py runs this file alone.

set(wheel_archs 80 86-real 89-real 90a-real 120-real)

if(RNNKERN_CUDA_ARCHS STREQUAL "wheels")
  set(RNNKERN_CUDA_ARCHS ${wheel_archs})
elseif(NOT RNNKERN_CUDA_ARCHS)
  execute_process(COMMAND nvidia-smi --query-gpu=compute_cap --format=csv,noheader
                  OUTPUT_VARIABLE found ERROR_QUIET RESULT_VARIABLE failed OUTPUT_STRIP_TRAILING_WHITESPACE)
  if(NOT failed AND found MATCHES "^[0-9.\n]+$")
    string(REPLACE "." "" found "${found}")
    string(REPLACE "\n" ";" found "${found}")
    list(REMOVE_DUPLICATES found)
    execute_process(COMMAND ${CMAKE_CUDA_COMPILER} --list-gpu-arch OUTPUT_VARIABLE known)
    string(REGEX REPLACE "[^0-9]+" ";" known "${known}")
    list(FILTER found EXCLUDE REGEX "^([1-6].|7[0-4])$")  # older than the kernels support
    set(unknown ${found})
    list(REMOVE_ITEM unknown ${known})
    if(unknown)
      message(STATUS "GPUs that ${CMAKE_CUDA_COMPILER} does not know: ${unknown}")
      list(REMOVE_ITEM found ${unknown})
    endif()
    list(TRANSFORM found REPLACE "^90$" "90a")  # Hopper's own instructions
    list(TRANSFORM found APPEND "-real")
    list(FILTER unknown INCLUDE REGEX "^(8[1-9]|9.|[1-9]..)$")  # newer than sm_80
    if(found AND unknown)
      list(REMOVE_ITEM found 80-real)
      list(APPEND found 80)
    endif()
    set(RNNKERN_CUDA_ARCHS ${found})
  endif()
  if(NOT RNNKERN_CUDA_ARCHS)  # no GPU, or none that the compiler knows
    set(RNNKERN_CUDA_ARCHS "80;90a-real")
  endif()
endif()
