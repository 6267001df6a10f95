{
  # For tools that know only node-gyp: hands over to cmake-js. The output named is never written, so that the action
  # always runs; cmake-js itself knows what is up to date.
  "targets": [
    {
      "target_name": "vmigrate",
      "type": "none",
      "actions": [
        {
          "action_name": "cmake_js",
          "inputs": ["native/CMakeLists.txt"],
          "outputs": ["<(PRODUCT_DIR)/never-written"],
          "action": ["bash", "scripts/build-native", "addon"]
        }
      ]
    }
  ]
}
