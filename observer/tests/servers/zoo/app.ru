# The handler of the zoo's Ruby servers: `/stall` blocks for 150 ms.
run lambda { |env|
  sleep 0.15 if env['PATH_INFO'] == '/stall'
  [200, { 'content-type' => 'text/plain', 'content-length' => '2' }, ['ok']]
}
