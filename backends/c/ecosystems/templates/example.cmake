
option(${MODEL}_EXAMPLE "Build examples/main.c, which trains on made-up data" OFF)
if(${MODEL}_EXAMPLE)
  add_executable(${model}_example examples/main.c)
  target_link_libraries(${model}_example PRIVATE $model)
endif()
