if(ESP_PLATFORM) # a component of ESP-IDF
  idf_component_register(SRCS
$sources
    INCLUDE_DIRS src)
  target_compile_options($${COMPONENT_LIB} PRIVATE -O2 -ffp-contract=off -fno-math-errno)
${placements}  return()
endif()
