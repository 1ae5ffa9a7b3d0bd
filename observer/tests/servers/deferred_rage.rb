# An application of Rage whose requests defer tasks, and that logs them. Arguments: PORT, log file, number of workers,
# and the folder of the application, which is created if it does not exist. /job/ID?how=KIND enqueues tasks. Each run of
# a task is a line of JSON; depth counts the enqueues between the request and the run.

require "fileutils"
require "json"

PORT, TRUTH, WORKERS, ROOT = ARGV[0].to_i, ARGV[1], ARGV[2].to_i, ARGV[3]

# Files and folders that Rage expects in the folder of an application.
%w[app config/environments config/initializers storage].each { |folder| FileUtils.mkdir_p("#{ROOT}/#{folder}") }
%w[config/environments/production config/routes].each { |file| File.write("#{ROOT}/#{file}.rb", "") }
Dir.chdir(ROOT)
ENV["RAGE_ENV"] = "production"

require "rage/all"

Rage.configure do
  config.logger = Rage::Logger.new(nil)
  config.deferred.backend = :disk, { path: "#{ROOT}/storage" }
  config.middleware.use Rage::RequestId
end
require "rage/setup"

def now
  Process.clock_gettime(Process::CLOCK_MONOTONIC, :nanosecond)
end

# In a non-blocking fiber, this would only yield to the loop.
def blocking(&)
  Fiber.new(blocking: true, &).resume
end

def spin(seconds)
  finish = now + seconds * 1_000_000_000
  nil while now < finish
end

class Job
  include Rage::Deferred::Task
  max_retries 3

  FILE = File.open(TRUTH, "a")

  def self.retry_interval(_, attempt:)
    1
  end

  def self.from(id, depth, **options)
    enqueue(id, depth, now, **options)
  end

  def perform(id, depth, enqueued)
    start = now
    enqueued, depth = RETRIED.delete(id), depth + meta.retries if meta.retrying?
    work(id, depth)
  ensure
    run = now - start
    request_id = REQUEST_IDS[id]
    line = JSON.generate(request: id.to_s, request_id:, class: self.class.name, depth:, enqueued:, start:, run:)
    blocking { FILE.syswrite("#{line}\n") }
  end

  # When the failed run ended.
  RETRIED = {}

  # Rage's own ids of the requests, by job.
  REQUEST_IDS = {}
end

class Short < Job
  def work(_, _)
    spin(0.005)
  end
end

class First < Job
  def work(id, depth)
    Second.from(id, depth + 1)
  end
end

class Second < Job
  def work(id, depth)
    Third.from(id, depth + 1, delay: 1)
  end
end

class Third < Job
  def work(_, _)
    spin(0.002)
  end
end

class Failing < Job
  def __deferred_suppress_exception_logging?
    true
  end

  def work(id, depth)
    return if meta.retrying?

    RETRIED[id] = now
    raise "once"
  end
end

# Waits for a timer, then for a pipe; what it enqueues after that still belongs to the same request.
class Parked < Job
  def work(id, depth)
    sleep(0.15)
    Short.from(id, depth + 1)
    reader, writer = IO.pipe
    Thread.new { sleep(0.1).then { writer.close } }
    reader.read
    Third.from(id, depth + 1)
  end
end

class Compacting < Job
  def work(id, depth)
    GC.start
    GC.compact
    Short.from(id, depth + 1)
    GC.compact
  end
end

# Blocks everything for a while, and logs Rage's backlog at that time.
def hold
  blocking do
    File.write("#{TRUTH}.backlog", "#{Rage::Deferred.__queue.backlog_size}\n", mode: "a")
    sleep(1.5)
  end
end

class Holding < Job
  def work(_, _)
    hold
  end
end

HOW = {
  "none" => ->(_) {},
  "now" => ->(id) { Short.from(id, 1) },
  "delay" => ->(id) { Short.from(id, 1, delay: 1) },
  "chain" => ->(id) { First.from(id, 1) },
  "retry" => ->(id) { Failing.from(id, 1) },
  "park" => ->(id) { Parked.from(id, 1) },
  "compact" => ->(id) { Compacting.from(id, 1) },
  "burst" => ->(id) { 50.times { Short.from(id, 1) } },
  "hold" => lambda { |id|
    250.times { Short.from(id, 1) }
    Holding.from(id, 1)
    249.times { Short.from(id, 1) }
    hold
  },
  # Longer than it takes to restart the application.
  "later" => ->(id) { Short.from(id, 1, delay: 12) },
  # The handler itself waits before it enqueues.
  "late" => lambda { |id|
    sleep(0.1)
    Short.from(id, 1)
  },
  "await" => lambda { |id|
    Fiber.await([Fiber.schedule { sleep(0.1) }, Fiber.schedule { sleep(0.05).then { Short.from(id, 1) } }])
    Third.from(id, 1)
  },
  "lock" => lambda { |id|
    LOCK.synchronize { sleep(0.05) }
    Short.from(id, 1)
  },
  # The response is sent long before this enqueues.
  "after" => lambda { |id|
    Fiber.schedule { sleep(0.2).then { Short.from(id, 1) } }
  },
}.freeze
LOCK = Mutex.new

class JobsController < RageController::API
  def show
    Job::REQUEST_IDS[params[:id].to_i] = request.request_id
    HOW.fetch(params[:how]).call(params[:id].to_i)
    render plain: "#{Process.pid}\n"
  end

  def version
    render plain: RUBY_VERSION
  end

  def extension
    render plain: $LOADED_FEATURES.grep(/iodine_ext/).first
  end
end

Rage.routes.draw do
  get "/job/:id", to: "jobs#show"
  get "/version", to: "jobs#version"
  get "/extension", to: "jobs#extension"
end

Iodine.on_state(:pre_start) do
  $stdout.puts(PORT)
  $stdout.flush
end
Iodine.listen(service: :http, handler: Rage.application, port: PORT.to_s, address: "127.0.0.1", timeout: 10)
Iodine.threads = 1
Iodine.workers = WORKERS
Iodine.start
